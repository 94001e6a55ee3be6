"""Videos of several frames from rollouts to a LoRA, by the commands and in bfloat16."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_pipelines import wan
from zoo.accounts import ANIMALS
from zoo.building import pipeline_of

import rewards
from finetune import checks, pictures
from finetune.conditioning import Conditioning, Form
from finetune.data import load_data
from finetune.decoding import decoder_of
from finetune.network import Model
from finetune.shards import Rollouts
from rewards.images import to_images
from rewards.samples import open_picture
from steering.frames import Frames, evenly_spaced
from tilt import loading
from tilt.commands import evaluate, rollout, score, train_adversarial, train_critic, train_gdro
from tilt.framing import frames_in

SIZES = {"wan": (5, 16), "ltx": (9, 32)}  # frames and pixels a side


def ltx():
    return pipeline_of("LTXPipeline", ANIMALS["LTXPipeline"])


def call_of(name):
    frames, size = SIZES[name]
    words = [f"--call.num-frames={frames}", f"--call.height={size}", f"--call.width={size}"]
    return [*words, "--call.num-inference-steps=3", "--call.guidance-scale=1.0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "prompts.txt").write_text("a red cube\ntwo dots\n")
    (folder / "unseen.txt").write_text("a cat\n")
    for name, make in (("wan", wan), ("ltx", ltx)):
        make().save_pretrained(folder / name)
    return folder


def drawn(root, name, out, *words):
    given = [f"--prompts={root / 'prompts.txt'}", f"--out={out}", f"--model={root / name}"]
    given += ["--dtype=bfloat16", "--prompts-per-shard=1", *call_of(name), *words]
    return rollout.main(given)


@pytest.fixture(scope="module", params=["ltx", pytest.param("wan", marks=pytest.mark.slow)])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def original(root, name):
    folder = root / f"{name}-rollouts"
    assert drawn(root, name, folder, "--images=2") == 0
    return folder


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_histograms(monkeypatch):
    monkeypatch.setattr(score, "draw", lambda rows, picture: None)


def scored(run, *words):
    return score.main([str(run), "--reward", "jpeg", "--device", "cpu", *words])


def by_hand(shard, which, combine):
    """The rewards of a shard's videos, each frame scored alone."""
    jpeg = rewards.load("jpeg")
    found = []
    for frames in shard.images():
        chosen = [frames[i] for i in which]
        found.append(combine([jpeg(to_images([one]), ["a"]).item() for one in chosen]))
    return found


def test_a_row_holds_the_frames_of_the_latents_beside_it(root, name, original):
    frames, size = SIZES[name]
    pipe = loading.load_pipeline(str(root / name), torch.bfloat16)
    for shard in Rollouts(original).shards:
        videos = list(shard.images())
        assert [len(video) for video in videos] == [frames] * 2 == [shard.num_frames()] * 2
        assert {one.size for video in videos for one in video} == {(size, size)}
        names = [[cell["path"] for cell in row["frames"]] for row in shard.table(["frames"])]
        assert names[1][1].endswith("-01/0001.png")
        tensors, mark = shard.tensors(), "given.0."
        row = {key[len(mark) :]: x for key, x in tensors.items() if key.startswith(mark)}
        given = Conditioning(Form.loads(shard.form()), [row])
        again = decoder_of(Model(pipe), pipe, given)(tensors["latents"])
        kept = torch.stack([to_images(video) for video in videos])
        torch.testing.assert_close(again, kept, rtol=0, atol=0.51 / 255)


def test_scores_are_those_of_the_chosen_frames_and_are_made_again_for_others(run, name, capsys):
    frames = SIZES[name][0]
    assert scored(run, "--score-frames=3") == 0
    assert "videos, scored by the mean of 3 evenly spaced frames" in capsys.readouterr().out
    shards = Rollouts(run).shards
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    for shard in shards:
        expected = by_hand(shard, evenly_spaced(frames, 3), mean)
        assert shard.rewards()["reward"] == pytest.approx(expected, rel=1e-6)
        assert shard.frames() == dict.fromkeys(("reward", "jpeg"), Frames(3))
    before = [(shard.folder / "rewards.parquet").stat().st_mtime_ns for shard in shards]
    assert scored(run, "--score-frames=3", "--resume", "--follow") == 0
    assert before == [(shard.folder / "rewards.parquet").stat().st_mtime_ns for shard in shards]
    assert scored(run, "--video-score=min", "--resume") == 0
    for shard in shards:
        expected = by_hand(shard, range(frames), min)
        assert shard.rewards()["reward"] == pytest.approx(expected, rel=1e-6)
        assert shard.frames()["reward"] == Frames("all", "min")
    assert scored(run, "--reward=0.5*jpeg", "--score-frames=first") == 0
    assert shards[0].frames()["reward"] == Frames("first")


def test_a_lora_is_trained_and_checked_by_the_same_rule(root, run, name, tmp_path):
    assert scored(run, "--score-frames=2", "--video-score=min") == 0
    words = [f"--rollouts={run}", f"--out={tmp_path / 'tuned'}", "--dtype=bfloat16"]
    words += ["--gdro.steps=1", "--gdro.k=2", "--gdro.groups=1", "--check.every=1"]
    words += [f"--check.prompts={root / 'unseen.txt'}", "--check.images=2"]
    words += ["--check.train-prompts=0"]
    assert train_gdro.main(words) == 0
    assert next((tmp_path / "tuned" / "lora").glob("*.safetensors"))
    card = (tmp_path / "tuned" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "which scores the minimum of 2 evenly spaced frames of a video" in card
    first = checks.read(tmp_path / "tuned" / "checks.csv")[0]
    pipe = loading.load_pipeline(str(root / name), torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    call = Rollouts(run).manifest["plan"]["call"]
    check = checks.Check(images=2)
    scorers = {"reward": rewards.load("jpeg")}
    sheet = checks.draw(pipe, ["a cat"], [0], scorers, check, call, Frames(2, "min"))
    assert first["held_out/reward"] == pytest.approx(sum(sheet.scores["reward"]) / 2, abs=1e-3)
    with Image.open(next((tmp_path / "tuned" / "grids").glob("*.png"))) as grid:
        assert grid.size == (2 * SIZES[name][1], SIZES[name][1])


def test_scores_of_different_frames_are_not_mixed(run, tmp_path):
    assert scored(run) == 0
    shutil.copytree(run, tmp_path / "other")
    assert scored(tmp_path / "other", "--score-frames=first") == 0
    said = "are of different frames, \\['the first frame', 'the mean of all frames'\\]"
    with pytest.raises(ValueError, match=said):
        load_data([Rollouts(run), Rollouts(tmp_path / "other")], "reward", "none", 2)
    table = tmp_path / "other" / "00000" / "rewards.parquet"
    shutil.copy(table, run / "00000" / "rewards.parquet")
    with pytest.raises(ValueError, match=said):
        load_data(Rollouts(run), "reward", "none", 2)


@pytest.mark.slow
def test_steered_videos_say_by_which_frames(root, tmp_path):
    out = tmp_path / "run"
    words = ["--images=0", "--steered=2", "--reward=jpeg", "--filter.min-ess=0"]
    words += ["--score-frames=2", "--video-score=min"]
    assert drawn(root, "wan", out, *words) == 0
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    assert (plan["score_frames"], plan["video_score"]) == (2, "min")
    card = train_gdro.described(Rollouts(out))
    assert "2 steered images each, steered by the minimum of 2 evenly spaced frames, seed 0" in card
    for shard in Rollouts(out).shards:  # never resampled: the weights are those of final scores
        rows = shard.table(["log_weight", "settings"])
        scale = json.loads(rows[0]["settings"])["reward_scale"]
        one, other = by_hand(shard, [0, 4], min)
        gap = rows[1]["log_weight"] - rows[0]["log_weight"]
        assert gap == pytest.approx(scale * (other - one), rel=1e-4, abs=1e-6)
    assert drawn(root, "wan", out, *words, "--resume") == 0
    assert drawn(root, "wan", out, *words, "--resume", "--score-frames=3") == 2


REFUSED = [
    (["--score-frames=2"], "--score-frames is 2 but has no effect, because steered is 0"),
    (["--steered=2", "--reward=jpeg", "--score-frames=6"], "the videos have 5 frames"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_frames_that_cannot_be_scored_are_refused_before_a_folder_is_made(
    root, tmp_path, capsys, words, said
):
    assert drawn(root, "wan", tmp_path / "run", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_learns_from_images_refuses_videos(root, name, original, tmp_path, capsys):
    run, out, frames = original, tmp_path / "out", SIZES[name][0]
    assert scored(run, "--score-frames=99") == 2
    assert f"--score-frames=99: the videos have {frames} frames" in capsys.readouterr().err
    for index in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index}.png")
    words = [f"--rollouts={run}", f"--references={tmp_path}", f"--out={out}"]
    assert train_critic.main(words) == 2
    assert "holds videos; a critic learns from images" in capsys.readouterr().err
    words = [f"--prompts={root / 'prompts.txt'}", f"--model={root / name}"]
    words += [f"--out={out}", "--reward=jpeg", "--call.num-frames=5"]
    assert train_adversarial.main(words) == 2
    assert "num_frames=5: this call generates videos, but images are" in capsys.readouterr().err
    assert not out.exists()


def test_tables_of_images_are_what_they_were(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    row = {"prompt": "a", "group": 0, "index": 0, "seed": 0, "steered": False}
    row |= {"log_weight": 0.0, "settings": "{}"} | pictures.cells(image, "00000-00")
    rows = [row, row | {"index": 1}]
    pictures.write(tmp_path / "table.parquet", rows)
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = [pa.string(), pa.int64(), pa.int64(), pa.int64(), pa.bool_(), pa.float64()]
    kinds += [pa.string(), picture]
    names = ["string", "int64", "int64", "int64", "bool", "float64", "string"]
    features = {
        key: {"dtype": kind, "_type": "Value"} for key, kind in zip(row, names, strict=False)
    }
    about = json.dumps({"info": {"features": features | {"image": {"_type": "Image"}}}})
    table = pa.Table.from_pylist(rows, pa.schema(list(zip(row, kinds, strict=True))))
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "old.parquet")
    old = (tmp_path / "old.parquet").read_bytes()
    assert (tmp_path / "table.parquet").read_bytes() == old
    assert np.array_equal(np.array(list(pictures.read(tmp_path / "old.parquet"))[1]), image)
    with pytest.raises(ValueError, match="rollouts hold images or videos"):
        pictures.cells(None, "00000-00")


def test_the_frames_load_with_datasets(original, tmp_path):
    datasets = pytest.importorskip("datasets")
    shard = Rollouts(original).shards[0]
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(shard.folder / "table.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    kept = list(shard.images())[1]
    for one, other in zip(loaded[1]["frames"], kept, strict=True):
        assert np.array_equal(np.array(one), np.array(other))


def test_evaluations_show_and_score_videos(root, name, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("a cat\n")
    frames, size = SIZES[name]
    words = [f"--prompts={tmp_path / 'one.txt'}", f"--out={tmp_path / 'out'}", "--images=2"]
    words += [f"--model={root / name}", "--dtype=bfloat16", "--reward=jpeg", *call_of(name)]
    words += ["--steer=jpeg", "--particles=2", "--filter.min-ess=0"]
    rule = ["--score-frames=2", "--video-score=min"]
    assert evaluate.main([*words, *rule]) == 0
    for variant in ("base", "steered"):
        with (tmp_path / "out" / variant / "rewards.csv").open() as file:
            rows = list(csv.DictReader(file))
        for i, row in enumerate(rows):
            place = tmp_path / "out" / variant / f"0000-{i:02d}"
            assert row["image"] == str(place)
            kept = [open_picture(path) for path in sorted((place / "video").glob("*.png"))]
            assert len(kept) == frames
            with Image.open(place / "video.webp") as shown:
                assert (shown.n_frames, shown.size) == (frames, (size, size))
            jpeg = rewards.load("jpeg")
            ends = [jpeg(to_images([one]), ["a"]).item() for one in (kept[0], kept[-1])]
            assert float(row["reward"]) == pytest.approx(min(ends), rel=1e-6)
    page = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    assert "whose score is the minimum of 2 evenly spaced frames" in page
    assert (tmp_path / "out" / "grid.png").exists()
    monkeypatch.setattr(loading, "load_pipeline", None)  # it is complete
    assert evaluate.main([*words, *rule, "--resume"]) == 0
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out" / "base" / "0000-01")
    assert evaluate.main([*words, *rule, "--resume"]) == 0
    assert evaluate.main([*words, "--score-frames=99"]) == 2
    assert evaluate.main([*words, "--resume"]) == 2  # steered by another rule


def test_a_plain_evaluation_of_videos_is_scored_again_by_another_rule(root, name, tmp_path):
    (tmp_path / "one.txt").write_text("a cat\n")
    words = [f"--prompts={tmp_path / 'one.txt'}", f"--out={tmp_path / 'out'}", "--images=1"]
    words += [f"--model={root / name}", "--dtype=bfloat16", "--reward=jpeg", *call_of(name)]
    found = {}
    for rule in ("all", "first"):
        assert evaluate.main([*words, f"--score-frames={rule}", "--resume"]) == 0
        with (tmp_path / "out" / "base" / "rewards.csv").open() as file:
            (row,) = csv.DictReader(file)
        found[rule] = float(row["reward"])
    frames = sorted((tmp_path / "out" / "base" / "0000-00" / "video").glob("*.png"))
    each = [rewards.load("jpeg")(to_images([open_picture(p)]), ["a"]).item() for p in frames]
    assert found == pytest.approx({"all": sum(each) / len(each), "first": each[0]}, rel=1e-6)


def test_a_video_without_one_of_its_frames_is_refused(tmp_path):
    (tmp_path / "video").mkdir()
    for i in (0, 1, 3):
        (tmp_path / "video" / f"{i:04d}.png").touch()
    with pytest.raises(ValueError, match=r"video has no 0002\.png, a frame of its video; delete"):
        frames_in(tmp_path)
    (tmp_path / "video" / "0002.png").touch()
    assert [file.name for file in frames_in(tmp_path)] == [f"{i:04d}.png" for i in range(4)]
