"""What is carried on is the very run that was begun, and what is read back is whole."""

import contextlib
import functools
import math
import re
import resource
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finetune import checks, config, lora, nft
from finetune.nft import Nft
from finetune.shards import Rollouts, Shard, add_rewards
from finetune.state import MAY_CHANGE, check_out, load_state, save_state
from tilt import exit_status, loading
from tilt.commands import rollout, train_adversarial, train_critic, train_gdro


class Trainer:
    """What keeps a state, as trainers do."""

    step = 3

    def __init__(self):
        self.weights = {"a": torch.zeros(2, 3)}

    def state_dict(self):
        return {"step": self.step, "weights": dict(self.weights)}

    def load_state_dict(self, state):
        self.step = int(state["step"])
        lora.fill(self.weights, state["weights"])


def begun(settings):
    """The folder of a run with these settings, that has a state."""
    out = Path(settings.out)
    config.write(settings, out / "settings.yaml")
    save_state(Trainer(), out, made_of={"rollouts": "abc"})
    return settings


def others(kind):
    """{name: another value} of every setting of a run, those of groups by their full names."""
    odd = {
        "model": "tiny-sd", "lora": "a/lora", "push_to_hub": "me/words", "dtype": "bfloat16",
        "check.best": "train/reward",
        "gdro.form": "rank", "gdro.weight": "elbo", "gdro.reward_norm": "rank", "method": "nft",
        "critic_kind": "preference", "kind": "preference", "critic.loss": "bce",
        "critic.trigger": "every_n", "critic.below": 0.5, "critic.smoothing": 0.1, "held_out": 0.2,
        "grpo.noise": 0.5, "grpo.spread": "none", "grpo.guidance_scale": 2.0,
        "grpo.sde": "flow", "grpo.ratio": "guard", "grpo.kl_space": "outputs",
    }  # fmt: skip

    def walk(settings, prefix=""):
        for field in fields(settings):
            value, full = getattr(settings, field.name), prefix + field.name
            choices = getattr(field.metadata.get("range"), "choices", ())
            if is_dataclass(value):
                yield from walk(value, f"{full}.")
            elif full in odd:
                yield full, odd[full]
            elif full.endswith("times"):
                yield full, "uniform"
            elif full.endswith("ema"):
                yield full, 0.25
            elif isinstance(value, bool):
                yield full, not value
            elif isinstance(value, int):
                yield full, value + 1
            elif isinstance(value, float):
                yield full, value + 1.0
            elif choices:
                yield full, next(choice for choice in choices if choice != value)
            elif isinstance(value, str):
                yield full, value + "other"
            elif isinstance(value, list):
                yield full, ["to_q"]
            else:
                yield full, {"height": 64}

    return dict(walk(kind()))


def changed(settings, name, value):
    head, _, tail = name.partition(".")
    if not tail:
        return replace(settings, **{name: value})
    return replace(settings, **{head: replace(getattr(settings, head), **{tail: value})})


class RefusedError(Exception):
    """By the name of the setting."""


def check_named(settings, name):
    try:
        check_out(settings, ignore=("nft", "awm"))
    except ValueError as error:
        if f"was begun with {name}=" in str(error) or f"was begun with {name}." in str(error):
            raise RefusedError from None
        raise


@pytest.mark.parametrize("script", [train_gdro, train_adversarial, train_critic])
def test_every_setting_that_changes_the_run_is_refused_by_name(script, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "read", functools.cache(config.read))  # one record, many times
    first = replace(script.OPTIONS.kind(), out=str(tmp_path / "a"))
    if hasattr(first, "check"):
        first = replace(first, check=replace(first.check, every=5), dtype="float32")
    begun(first)
    record = (tmp_path / "a" / "settings.yaml").read_bytes()
    again = replace(first, resume=True)
    check_out(again)
    may = set()
    for name, value in others(script.OPTIONS.kind).items():
        if name in ("out", "resume") or name.startswith(("nft.", "awm.")):
            continue
        with contextlib.suppress(RefusedError):
            check_named(changed(again, name, value), name)
            may.add(name)
    last = {name.rpartition(".")[2] for name in may}
    assert last <= {name.rpartition(".")[2] for name in MAY_CHANGE}
    free = {"check.every", "check.patience"} if hasattr(first, "check") else set()
    assert {name for name in may if name.startswith("check.")} == free
    assert not {n for n in may if n.startswith("critic.")}
    assert (tmp_path / "a" / "settings.yaml").read_bytes() == record


def test_settings_of_the_other_method_and_of_checks_that_never_were_may_differ(tmp_path):
    first = begun(train_adversarial.TrainAdversarial(out=str(tmp_path)))
    again = replace(first, resume=True, nft=Nft(lr=1.0))
    check_out(again, ignore=("nft", "awm"))
    check_out(changed(again, "check.reward", "jpeg"), ignore=("nft", "awm"))
    with pytest.raises(ValueError, match=r"begun with nft\.lr=0\.0001, not 1\.0"):
        check_out(again)


def test_a_folder_under_another_name_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = begun(train_gdro.TrainGdro(out="run", rollouts=["made"]))
    check_out(replace(first, resume=True, rollouts=[str(tmp_path / "run" / ".." / "made")]))


@pytest.mark.parametrize("script", [train_gdro, train_adversarial, train_critic])
def test_what_may_differ_is_said_by_help(script):
    own = script.OPTIONS.flags()
    may = {name for name in MAY_CHANGE if name in own and name not in ("out", "resume")}
    for name in ("steps", "micro_groups", "micro_images", "compile", "gradient_checkpointing"):
        may |= {name} if any(word.endswith(f".{name}") for word in own) else set()
    (said,) = (one.metadata["help"] for one in fields(script.OPTIONS.kind) if one.name == "resume")
    assert {n for n in MAY_CHANGE if re.search(rf"(?<![.\w]){re.escape(n)}\b", said)} == may


def test_an_out_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "steered").mkdir()
    (tmp_path / "steered" / "report.html").touch()
    for name, said in (("file", "is a file"), ("steered", "and no training run")):
        with pytest.raises(ValueError, match=said):
            check_out(train_gdro.TrainGdro(out=str(tmp_path / name)))
    begun(train_gdro.TrainGdro(out=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="add resume=true"):
        check_out(train_gdro.TrainGdro(out=str(tmp_path / "run")))
    (tmp_path / "run" / "settings.yaml").write_text("gdro: [")
    with pytest.raises(ValueError, match="cannot be continued"):
        check_out(train_gdro.TrainGdro(out=str(tmp_path / "run"), resume=True))


def test_other_data_under_the_same_name_is_refused(tmp_path):
    save_state(Trainer(), tmp_path, made_of={"rollouts": "abc"})
    assert load_state(Trainer(), tmp_path, {"rollouts": "abc"})
    with pytest.raises(ValueError, match="begun when rollouts= stood for other contents"):
        load_state(Trainer(), tmp_path, {"rollouts": "abd"})


class Evil:
    def __reduce__(self):
        return (print, ("run",))


DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "zeros": bytes(100),
    "a list": [1],
    "a number": 3,
    "nothing": {},
    "code": {"step": 1, "weights": Evil()},
    "other weights": {"step": 1, "weights": {"b": torch.zeros(2, 3)}},
    "another rank": {"step": 1, "weights": {"a": torch.zeros(1, 3)}},
    "a scalar": {"step": 1, "weights": {"a": torch.zeros(())}},
    "no step": {"weights": {"a": torch.zeros(2, 3)}},
    "no weights": {"step": 1, "weights": None},
    "nan": {"step": 1, "weights": {"a": torch.full((2, 3), math.nan)}},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_state_is_one_sentence_without_bad_advice(kind, tmp_path, capsys):
    content, file = DAMAGED[kind], tmp_path / "state.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"state\.pt .* delete .* to begin anew") as told:
        load_state(Trainer(), tmp_path)
    assert "weights_only" not in str(told.value)
    assert "\n" not in str(told.value)
    assert capsys.readouterr().out == ""


def test_a_state_that_was_cut_off_anywhere_is_refused(tmp_path):
    save_state(Trainer(), tmp_path)
    whole = (tmp_path / "state.pt").read_bytes()
    for size in range(1, len(whole), len(whole) // 20):
        (tmp_path / "state.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged"):
            load_state(Trainer(), tmp_path)


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond a kilobyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_that_safetensors_meets_is_no_traceback(tmp_path, capsys):
    from safetensors.torch import save_file

    def work(settings):
        with full_disk():
            save_file({"a": torch.zeros(10_000)}, tmp_path / "a")

    files = "finished shards are kept", "0*/x"
    words = [f"--out={tmp_path}"]
    assert exit_status.of_run(rollout.OPTIONS, words, work, *files) == 1
    told = capsys.readouterr().err
    assert told.startswith("tilt rollout: ")
    assert told.count("\n") == 1
    assert told.endswith("; nothing is kept yet\n")
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "x").touch()
    assert exit_status.of_run(rollout.OPTIONS, words, work, *files) == 1
    assert capsys.readouterr().err.endswith("; finished shards are kept\n")


def test_an_interrupt_tells_of_a_checkpoint_where_there_is_one(tmp_path, capsys):
    def work(settings):
        raise KeyboardInterrupt

    settings = train_gdro.TrainGdro(out=str(tmp_path / "a"))
    for told in ("nothing is kept yet", "the last checkpoint is kept"):
        kept = "the last checkpoint is kept", "state.pt"
        assert exit_status.of_run(train_gdro.OPTIONS, [f"--out={settings.out}"], work, *kept) == 130
        said = f"tilt train gdro: interrupted; {told}: repeat with --resume\n"
        assert capsys.readouterr().err == said
        begun(settings)


def test_a_full_disk_that_torch_meets_is_told_in_plain_words(tmp_path):
    """PyTorch's own are "[enforce fail at inline_container.cc:603]"."""
    for kept in ("", "; the one written before it is kept"):
        trainer = Trainer()
        trainer.weights = {"a": torch.zeros(10_000)}
        with full_disk(), pytest.raises(ValueError, match="cannot be written") as told:
            save_state(trainer, tmp_path)
        said = f"the state of step 3 cannot be written to {tmp_path} (the disk may be full){kept}"
        assert str(told.value) == said
        save_state(Trainer(), tmp_path)


def test_an_automatic_dtype_is_written_down_as_what_it_is(tmp_path, monkeypatch):
    first = loading.resolved(train_gdro.TrainGdro(out=str(tmp_path)))
    assert first.dtype == "float32"
    begun(first)
    check_out(loading.resolved(replace(first, dtype="auto", resume=True)))
    monkeypatch.setattr(loading, "pick_dtype", lambda name, device: torch.bfloat16)  # of a GPU
    with pytest.raises(ValueError, match="begun with dtype='float32', not 'bfloat16'"):
        check_out(loading.resolved(replace(first, dtype="auto", resume=True)))


def test_each_process_asks_its_own_device_for_the_dtype(monkeypatch):
    seen = []

    def pick(name, device):
        seen.append(str(device))
        return torch.float16

    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(loading, "pick_dtype", pick)
    for name, value in (("LOCAL_RANK", "3"), ("ACCELERATE_USE_CPU", "true")):
        monkeypatch.setenv(name, value)
        loading.resolved(train_gdro.TrainGdro(dtype="float16"))
    assert seen == ["cuda:3", "cpu"]


def test_an_average_of_another_law_is_not_carried_on():
    weights = {"a": torch.nn.Parameter(torch.zeros(2))}
    one, other = lora.Average(weights, 0.9), lora.Average(weights, 0.9, nft.slowly)
    one.load_state_dict(lora.Average(weights, 0.9).state_dict())
    with pytest.raises(ValueError, match="has the decay bound warm_up, not slowly"):
        other.load_state_dict(one.state_dict())
    before = {"step": 3, "weights": {"a": torch.ones(2)}}  # of a version that did not say
    with pytest.raises(ValueError, match="has the decay bound of an earlier version, not warm_up"):
        one.load_state_dict(before)
    lora.Average(weights, 0.0).load_state_dict(before)  # no average at all


@pytest.mark.parametrize(
    "text",
    [
        "step,loss\n1,x\n",
        "hello\nworld\n",
        "loss\n1\n",
        "step,loss\n1\n",
        "step,loss\n1,2,3\n",
        "\0\n\0\n",
    ],
)
def test_a_table_of_something_else_is_named(text, tmp_path):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=r"log\.csv is no table of numbers.* move it away"):
        checks.rewind(tmp_path / "log.csv", 3)
    assert (tmp_path / "log.csv").read_text() == text


def test_foreign_columns_are_refused_and_a_row_that_was_cut_off_is_made_again(tmp_path):
    file = tmp_path / "log.csv"
    checks.append(file, {"step": 1, "loss": 2.0})
    with pytest.raises(ValueError, match=r"columns \['step', 'loss'\], not \['step', 'reward'\]"):
        checks.append(file, {"step": 2, "reward": 2.0})
    with file.open("a") as target:
        target.write("2,0.")
    assert checks.read(file) == [{"step": 1.0, "loss": 2.0}]
    checks.rewind(file, 5)
    checks.append(file, {"step": 2, "loss": 1.5})
    assert [row["loss"] for row in checks.read(file)] == [2.0, 1.5]


def test_a_check_without_a_score_is_never_the_best():
    rows = [{"step": 0, "held_out/reward": math.nan}, {"step": 5, "held_out/reward": 0.25}]
    assert checks.best_row(rows, "held_out/reward")["step"] == 5
    with pytest.raises(ValueError, match=r"held_out/reward is nan at every check, .* step 0"):
        checks.best_row(rows[:1], "held_out/reward")
    late = [*rows, {"step": 9, "held_out/reward": math.inf}]
    assert checks.best_row(late, "held_out/reward")["step"] == 5
    assert checks.is_over(late, checks.Check(patience=1))
    sheet = checks.Sheet({"reward": [1.0, math.nan, 3.0, math.inf]})
    assert checks.means([sheet]) == {"reward": 2.0}


MANIFESTS = ["", "[]", "3", "{}", '{"plan": {}}', '{"plan": 3}', "[" * 5000, "\\", "null"]


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_damaged_manifest_of_rollouts_is_one_sentence(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="holds no rollouts"):
        Rollouts(tmp_path)


def test_damaged_rewards_are_named(tmp_path):
    shard = Shard(tmp_path)
    pq.write_table(pa.table({"group": [0, 0, 1]}), tmp_path / "table.parquet")
    add_rewards(shard, {"reward": [1.0, math.nan, 3.0]}, "jpeg")
    assert shard.rewards()["reward"][2] == 3.0
    file = tmp_path / "rewards.parquet"
    whole = file.read_bytes()
    for content in (b"", b"PAR1", whole[:100], whole[:-20]):
        file.write_bytes(content)
        for read in (shard.rewards, shard.specs):
            with pytest.raises(ValueError, match=r"rewards\.parquet is damaged .* delete it"):
                read()
    for columns in ({"reward": [1.0]}, {"reward": ["a", "b", "c"]}):
        pq.write_table(pa.table(columns), file)
        with pytest.raises(ValueError, match="does not hold a number for each of 3 images"):
            shard.rewards()
    pq.write_table(pa.table({"reward": pa.array([1.0, None, 2.0], pa.float64())}), file)
    assert math.isnan(shard.rewards()["reward"][1])
