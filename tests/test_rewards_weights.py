"""Weights from files, folders and the hub: what is found, read, fitted, and how it is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from rewards.backends.local_vlm import LocalVlm
from rewards.models.aesthetic import AestheticReward
from rewards.models.critic import CriticReward, FeatureModel
from rewards.models.hpsv3 import Hpsv3Reward
from rewards.models.imagereward import ImageRewardReward
from rewards.towers.checkpoints import fetch, find, fit, hub, looks_like, read_state

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


def test_a_file_is_itself_and_a_folder_gives_the_first_of_the_names(tmp_path):
    for name in ("b.pt", "c.pt"):
        (tmp_path / name).touch()
    assert fetch(tmp_path / "c.pt", "a.pt") == tmp_path / "c.pt"
    assert fetch(str(tmp_path), "a.pt", "c.pt", "b.pt") == tmp_path / "c.pt"
    assert find(tmp_path, "a.pt") is None
    with pytest.raises(ValueError, match=r"holds none of \['a.pt', 'd.pt'\]"):
        fetch(tmp_path, "a.pt", "d.pt")


@pytest.mark.parametrize("source", ["/no/such/file", "./none", "~/none", "word", "a/b/c", "a b/c"])
def test_what_is_neither_place_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="neither a file, a folder that exists nor a hub id"):
        fetch(source, "a.pt")


@pytest.fixture
def online(monkeypatch):
    """A hub that answers, and whatever `held` says of each file's name."""
    held: dict[str, Any] = {}

    def download(repository: str, name: str) -> str:
        if isinstance(held[name], Exception):
            raise held[name]
        return f"{repository}/{held[name]}"

    session = SimpleNamespace(head=lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return held


def test_the_hub_gives_the_first_name_that_it_holds(online):
    online |= {"a": EntryNotFoundError("no"), "b": "found", "c": "later"}
    assert str(fetch("org/name", "a", "b", "c")) == "org/name/found"
    assert find("org/name", "a") is None
    with pytest.raises(ValueError, match=r"repository org/name holds none of \['a'\]"):
        fetch("org/name", "a")


def test_a_file_that_is_not_at_hand_offline_may_yet_be_on_the_hub(online):
    online |= {"a": LocalEntryNotFoundError("offline"), "b": "cached"}
    assert str(fetch("org/name", "a", "b")) == "org/name/cached"
    for ask in (fetch, find):
        with pytest.raises(ValueError, match="'org/name' could not be loaded from the hub"):
            ask("org/name", "a")


def test_without_a_network_nothing_is_tried_unless_it_is_cached(monkeypatch, tmp_path):
    def no_session():
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", no_session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tried = []

    def load(repository: str) -> None:
        with hub(repository):
            tried.append(repository)

    with pytest.raises(ValueError, match=r"org/name.*\(ConnectionError\); give a folder"):
        load("org/name")
    (tmp_path / "models--org--name").mkdir()
    load("org/name")
    load("hf-hub:org/name")
    load(str(tmp_path))
    assert tried == ["org/name", "hf-hub:org/name", str(tmp_path)]


def test_only_what_the_hub_did_is_blamed_on_the_hub(online, tmp_path):
    def failing(place: str, error: Exception) -> None:
        with hub(place):
            raise error

    with pytest.raises(ValueError, match=r"^my own$"):
        failing("org/name", ValueError("my own"))
    with pytest.raises(OSError, match=r"^disk$"):
        failing(str(tmp_path), OSError("disk"))
    with pytest.raises(ValueError, match=r"from the hub \(OSError\)"):
        failing("org/name", OSError("disk"))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_states_are_read_wrapped_or_not(tmp_path, wrapper):
    path = tmp_path / "weights.pt"
    torch.save({wrapper: STATE, "epoch": 3, "name": "x"} if wrapper else STATE, path)
    assert_same(read_state(path))


def test_states_are_read_from_both_kinds_of_file(tmp_path):
    save_file(STATE, tmp_path / "weights.safetensors")
    assert_same(read_state(tmp_path / "weights.safetensors"))
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_same(read_state(tmp_path / "old.bin"))


def assert_same(state: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(STATE)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "old.pt"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.99])
def test_a_download_that_was_cut_short_is_reported_as_that(tmp_path, name, part):
    state = {"weight": torch.zeros(64, 64)}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "old.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=r"bytes\) cannot be read: .* cut short; .* \(.+\)$"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>", "web page"),
        (b"<HTML>", "web page"),
        (b'{"error": "not found"}', "is not a file of weights; give"),
        (b"a picture that is none", "is not a file of weights; give"),
    ],
)
def test_other_files_that_come_down_in_their_place_are_named(tmp_path, content, message):
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path / name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_in_their_place_is_named_and_nobody_is_told_to_delete_it(tmp_path, kind):
    for name in ("picture.png", "weights.safetensors"):
        Image.new("RGB", (5, 7)).save(tmp_path / name, kind)
        with pytest.raises(
            ValueError, match=rf"{name} is not a file of weights but an image \({kind}"
        ):
            read_state(tmp_path / name)
        with pytest.raises(ValueError, match=f"an image .{kind}.; give one"):
            AestheticReward(str(tmp_path / name))


class Thing:
    """What a pickle might build."""


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"state_dict": STATE, "args": Thing()}])
def test_nothing_is_unpickled_but_tensors(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="Python objects besides tensors, which are not unpickled"):
        read_state(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}, torch.zeros(2)])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state(tmp_path / "weights.pt")


def test_fit_takes_every_key_in_the_modules_own_precision():
    module = nn.Linear(3, 2)
    fit(module, {key: value.half() for key, value in STATE.items()}, "here")
    assert module.weight.dtype == torch.float32
    assert_same(module.state_dict())


def test_fit_names_three_keys_and_counts_the_others():
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
    state = module.state_dict()
    with pytest.raises(ValueError, match=r"^here does not match Sequential: it lacks 0\.weight$"):
        fit(module, {k: v for k, v in state.items() if k != "0.weight"}, "here")
    wanted = r"lacks 0\.weight, 0\.bias, 1\.weight and 3 more; it looks like a LAION aesthetic head"
    with pytest.raises(ValueError, match=wanted):
        fit(module, {"layers.0.weight": torch.zeros(1)}, "here")
    with pytest.raises(ValueError, match=r"has unknown a, b, c and 1 more$"):
        fit(module, state | {key: torch.zeros(1) for key in "abcd"}, "here")
    with pytest.raises(ValueError, match=r"has misshapen 1\.weight \(2, 2\) for \(1, 1\)$"):
        fit(module, state | {"1.weight": torch.zeros(2, 2)}, "here")


def test_fit_ignores_only_what_it_was_told_to():
    module = nn.Linear(3, 2)
    state = STATE | {"a.position_ids": torch.arange(3)}
    fit(module, state, "here", ignore=[r".*position_ids$"])
    with pytest.raises(ValueError, match=r"unknown a\.position_ids"):
        fit(module, state, "here", ignore=[r"position_ids$"])  # it matches from the start
    before = module.bias.clone()
    fit(module, {"weight": STATE["weight"] + 1}, "here", ignore=["bias"])
    assert torch.equal(module.bias, before)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("visual.transformer.resblocks.0.ln_1.weight", "an open_clip model"),
        ("vision_model.encoder.layers.0.mlp.fc1.bias", "a transformers CLIP or SigLIP model"),
        ("blip.visual_encoder.cls_token", "ImageReward"),
        ("base_model.model.unet.to_q.lora_A.weight", "a LoRA adapter"),
        ("blocks.0.attn.qkv.weight", "a timm (or original DINO) vision transformer"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet or autoencoder"),
        ("layers.0.weight", "a LAION aesthetic head, version 2"),
        ("scoring_head.0.weight", "an aesthetic head, version 2.5"),
        ("rm_head.0.weight", "HPSv3 or another ranking head"),
        ("visual.blocks.0.attn.qkv.weight", "a Qwen2-VL"),
        ("model.visual.blocks.0.attn.qkv.weight", "a Qwen2-VL"),
        ("something.else", ""),
    ],
)
def test_checkpoints_are_known_by_their_keys(key, kind):
    assert looks_like(["first.one", key]) == kind


def test_a_lone_linear_layer_is_known():
    assert "version 1" in looks_like(["weight", "bias"])
    assert looks_like([]) == ""


@pytest.mark.parametrize("name", ["~no-such-user/x", "x" * 5000])
@pytest.mark.parametrize(
    "make", [fetch, CriticReward, FeatureModel, ImageRewardReward, LocalVlm, Hpsv3Reward]
)
def test_what_no_file_can_be_called_is_refused(make, name):
    with pytest.raises(ValueError, match=r"cannot be looked up|neither a f"):
        make(name)
