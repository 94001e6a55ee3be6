"""One folder for a run: every kind of run refuses the same folders, in the same words."""

import pytest

from finetune.folder import begun, refuse_changes


def test_a_fresh_folder_may_be_used_and_is_not_made(tmp_path):
    assert not begun(tmp_path / "new", "manifest.json")
    assert not (tmp_path / "new").exists()
    (tmp_path / ".hidden").touch()
    assert not begun(tmp_path, "manifest.json")


def test_what_is_begun_is_continued_only_where_that_is_asked_for(tmp_path):
    (tmp_path / "settings.yaml").touch()
    assert not begun(tmp_path, "settings.yaml", "*.pt")
    (tmp_path / "state.pt").touch()
    assert begun(tmp_path, "settings.yaml", "*.pt", resume=True)
    with pytest.raises(
        ValueError, match=r"holds an evaluation; add resume=true, or give another out="
    ):
        begun(tmp_path, "settings.yaml", "*.pt", kind="evaluation")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path, resume):
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match=r"other files, such as state.pt, and no run"):
        begun(tmp_path, "settings.yaml", "*.pt", resume=resume)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        begun(tmp_path / "state.pt", "settings.yaml", resume=resume)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"seed": 1}, {"seed": 2}, "begun with seed=1, not 2;"),
        ({}, {"seed": 2}, "begun with seed=None, not 2;"),
        ({"call": {"height": 64}}, {"call": {"height": 8}}, r"begun with call\.height=64, not 8;"),
        ({"weights": {"unet": "a"}}, {"weights": {"unet": "b"}}, "other weights of the model;"),
        ({"prompts": ["a"] * 99}, {"prompts": ["b"]}, "begun with another prompts=;"),
    ],
)
def test_a_change_is_refused_by_its_name(tmp_path, before, now, said):
    refuse_changes(tmp_path, before, before)
    refuse_changes(tmp_path, before, now, alike=lambda was, given: True)
    with pytest.raises(ValueError, match=said):
        refuse_changes(tmp_path, before, now)
