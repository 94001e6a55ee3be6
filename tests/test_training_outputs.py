"""What a training run takes and gives: several rollouts, LoRAs of earlier steps, an upload."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from test_data import run_of

from finetune import config
from finetune.data import load_data
from finetune.shards import Rollouts, check_alike, digest
from steering import tiny
from tilt.commands import rollout, score, train_adversarial, train_gdro

FILE = "pytorch_lora_weights.safetensors"
SMALL = ["--gdro.groups=2", "--gdro.k=2", "--gdro.rank=2", "--gdro.lr=1e-2", "--log-every=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two folders of rollouts of one model, with a prompt in common."""
    folder = tmp_path_factory.mktemp("rollouts")
    for name, words in (("a", ("CAT", "SUN")), ("b", ("SUN", "DOG", "OWL"))):
        file = folder / f"{name}.txt"
        file.write_text("".join(f'the word "{word}"\n' for word in words))
        line = [f"--prompts={file}", f"--out={folder / name}", "--images=2", f"--seed={len(words)}"]
        call = ["--call.num-inference-steps=1", "--call.guidance-scale=1.0"]
        assert rollout.main([*line, *call]) == 0
        assert score.main([str(folder / name), "--reward", "jpeg", "--device", "cpu"]) == 0
    return folder


def trained(out: Path, *words: str) -> int:
    return train_gdro.main([*words, f"--out={out}", *SMALL])


def test_the_prompts_of_several_runs_keep_their_own_images_and_conditioning(tmp_path):
    runs: list[Any] = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        runs.append(run_of(tmp_path / name, 2, (4, 2, 2)))
    data = load_data(runs, "reward", "none", 2)
    assert [group.prompt for group in data.groups] == list(range(12))
    assert [group.rows.tolist() for group in data.groups] == [[2 * i, 2 * i + 1] for i in range(12)]
    assert len(data.given.rows) == 12
    assert len(data.latents) == 24


def test_several_rollouts_are_trained_on_together(made, tmp_path, capsys):
    both = ["--rollouts", f"{made / 'a'}", f"{made / 'b'}"]
    assert trained(tmp_path / "out", *both, "--gdro.steps=2") == 0
    assert "5 prompts; 0 left out" in capsys.readouterr().out
    card = (tmp_path / "out/lora/README.md").read_text()
    assert "- 2 prompts, 2 plain" in card
    assert "- 3 prompts, 2 plain" in card
    assert trained(tmp_path / "out", *both, "--gdro.steps=3", "--resume") == 0
    assert trained(tmp_path / "out", *both[:2], "--gdro.steps=4", "--resume") == 2
    assert "was begun with" in capsys.readouterr().err


def test_one_folder_is_named_in_yaml_as_before(made, tmp_path):
    (tmp_path / "one.yaml").write_text(f"rollouts: {made / 'a'}\nout: x\n")
    read: Any = config.read(train_gdro.TrainGdro, tmp_path / "one.yaml")
    assert read.rollouts == [str(made / "a")]
    assert digest([Rollouts(made / "a")], "reward") == Rollouts(made / "a").digest("reward")


def test_rollouts_of_different_models_are_refused(made, tmp_path, capsys):
    both = ["--rollouts", f"{made / 'a'}", f"{made / 'b' / '..' / 'a'}"]
    assert trained(tmp_path / "out", *both) == 2
    assert "give each once" in capsys.readouterr().err
    first, second = (Rollouts(made / name) for name in ("a", "b"))
    check_alike([first, second])
    for change, message in (
        ({"pipeline": "FluxPipeline"}, "different models .pipeline"),
        ({"model": "another"}, "different models .model"),
        ({"weights": "another"}, "different models .weights: of other weights"),
    ):
        other: Any = SimpleNamespace(folder=second.folder, manifest=second.manifest | change)
        with pytest.raises(ValueError, match=message):
            check_alike([first, other])
    manifest = second.manifest | {"weights": "another", "lora": "abc", "model": "a copy"}
    later: Any = SimpleNamespace(folder=second.folder, manifest=manifest)
    check_alike([first, later], named=True)


def test_loras_of_earlier_steps_are_kept_and_written_again_by_a_resumed_run(made, tmp_path):
    words = [f"--rollouts={made / 'a'}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--gdro.steps=4", "--save-lora-every=2"]
    assert trained(whole, *words, *more) == 0
    assert trained(cut, *words, "--gdro.steps=2") == 0
    assert sorted(path.name for path in whole.glob("lora*")) == [
        "lora", "lora-000002", "lora-000004",
    ]  # fmt: skip
    for step, lora in ((2, cut / "lora"), (4, whole / "lora")):
        kept = whole / f"lora-00000{step}"
        one, two = load_file(lora / FILE), load_file(kept / FILE)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert f"those of step {step}" in (kept / "README.md").read_text()
    tiny.load("tiny-sd3").load_lora_weights(kept)
    # killed after the LoRA of step 4, before its checkpoint
    (cut / "lora-000004").mkdir()
    (cut / "lora-000004" / FILE).write_bytes(b"half")
    assert trained(cut, *words, *more, "--resume") == 0
    again = load_file(cut / "lora-000004" / FILE)
    assert all(torch.equal(again[name], two[name]) for name in two)


class FakeApi:
    """The hub's client, which records its calls, or fails with the token in its message."""

    endpoint = "https://hub.example"
    calls: ClassVar[list[tuple[str, dict[str, Any]]]]
    fails: ClassVar[tuple[str, ...]] = ()
    error: ClassVar[type[Exception]] = OSError

    def _called(self, name: str, given: dict[str, Any]) -> None:
        self.calls.append((name, given))
        if name in self.fails:
            raise self.error("403 for hf_SECRET\nat length")

    def create_repo(self, repo_id: str, **given: Any) -> None:
        huggingface_hub.utils.validate_repo_id(repo_id)
        self._called("create_repo", {"repo_id": repo_id} | given)

    def upload_folder(self, **given: Any) -> None:
        self._called("upload_folder", given)


@pytest.fixture
def hub(monkeypatch) -> type[FakeApi]:
    api = type("Api", (FakeApi,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_SECRET")
    return api


def test_the_lora_is_uploaded_to_a_private_repository_when_it_is_finished(made, tmp_path, hub):
    words = [f"--rollouts={made / 'a'}", "--gdro.steps=1", "--push-to-hub=me/words"]
    assert trained(tmp_path / "out", *words) == 0
    (first, repo), (second, sent) = hub.calls
    assert (first, second) == ("create_repo", "upload_folder")
    assert repo == {"repo_id": "me/words", "exist_ok": True, "private": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/words", tmp_path / "out/lora")
    assert trained(tmp_path / "out", *words, "--resume") == 0  # again, though it is finished
    assert [name for name, _ in hub.calls[2:]] == ["upload_folder"]
    texts = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(b"hf_SECRET" in path.read_bytes() for path in texts)


def test_a_repository_that_cannot_be_written_is_told_before_a_model_is_loaded(
    made, tmp_path, hub, capsys
):
    words = [f"--rollouts={made / 'a'}", "--gdro.steps=1"]
    hub.fails = ("create_repo",)
    assert trained(tmp_path / "out", *words, "--push-to-hub=me/words") == 2
    told = capsys.readouterr().err
    assert "the repository 'me/words' of the hub cannot be used (403 for *** at length)" in told
    assert "--push-to-hub OWNER/NAME" in told
    assert "hf_SECRET" not in told
    assert trained(tmp_path / "out", *words, "--push-to-hub=a/b/c") == 2
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_keeps_the_lora_and_is_repeated(made, tmp_path, hub, capsys):
    words = [f"--rollouts={made / 'a'}", "--gdro.steps=1", "--push-to-hub=me/words"]
    hub.fails = ("upload_folder",)
    assert trained(tmp_path / "out", *words) == 1
    told = capsys.readouterr().err
    assert "out/lora is complete, but could not be uploaded to 'me/words' (403 for ***" in told
    assert "hf_SECRET" not in told
    hub.fails = ()
    assert trained(tmp_path / "out", *words, "--resume") == 0
    assert capsys.readouterr().out.endswith("https://hub.example/me/words\n")


def test_an_online_run_keeps_what_an_upload_that_fails_would_send(tmp_path, hub, capsys):
    """Also if a file is refused in its transfer, for which the hub's client has another error."""
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    out, hub.fails, hub.error = tmp_path / "out", ("upload_folder",), RuntimeError
    words = [f"--prompts={tmp_path / 'prompts.txt'}", f"--out={out}", "--reward=jpeg"]
    words += [f"--grpo.{name}=2" for name in ("steps", "groups", "k", "rank")]
    words += ["--grpo.num-inference-steps=2", "--grpo.window-size=1"]
    words += ["--save-lora-every=1", "--push-to-hub=me/words"]
    assert train_adversarial.main(words) == 1
    told = capsys.readouterr().err
    assert "out/lora is complete, but could not be uploaded to 'me/words' (403 for ***" in told
    assert "--push-to-hub OWNER/NAME with --resume, which uploads it again" in told
    one, two, last = (
        load_file(out / name / FILE) for name in ("lora-000001", "lora-000002", "lora")
    )
    assert all(torch.equal(two[name], last[name]) for name in last)
    assert not all(torch.equal(one[name], last[name]) for name in last)
    assert "epoch" in (out / "lora-000001/README.md").read_text()
    hub.fails = ()
    assert train_adversarial.main([*words, "--resume"]) == 0
    assert [name for name, _ in hub.calls] == ["create_repo", *["upload_folder"] * 2]
