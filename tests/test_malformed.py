"""A campaign of malformed calls: no traceback, no hang, nothing accepted that the help excludes.

Each is refused with status 2 and one line that names the option or the value. The calls are made
from the options and signatures themselves (`malformed`). A few run by default, all of them with
`-m slow`, and those of another process too.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import functools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import malformed
import pytest
import torch
from chains import gaussian_kernel, linear, seeded
from command_line import OPTIONS
from diffusers import DDIMScheduler
from malformed import LONG, of_settings, of_signature, said, within
from PIL import Image
from tiny_pipelines import family

import rewards
from steering import FeynmanKac, Steered, generators, particle_filter, pipeline
from steering.schedulers import stochastic
from tilt import loading
from tilt.commands import app, compare, evaluate, rollout, score, steer
from tilt.commands import train_adversarial as online
from tilt.commands import train_critic as critic
from tilt.commands import train_gdro as gdro
from tilt.score_table import write_table

SHARED = [True]  # whether a model is loaded once; trainers change it
EVERY = 17  # of the calls one in so many runs by default
ALONE = ["--held-out=0", "--no-paired"]  # one prompt, and references without any
SHORT = ["--grpo.steps=1", "--grpo.groups=1", "--grpo.k=2", "--grpo.num-inference-steps=4"]
USUAL = ["--grpo.steps=200", "--grpo.groups=4", "--grpo.k=8", "--grpo.num-inference-steps=10"]
CALL = ["--call.num-inference-steps=4", "--call.guidance-scale=1.0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands below name; the embedded model is loaded once."""
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "prompts.txt").write_text('the word "CAT"\n', encoding="utf-8")
    (folder / "other.txt").write_text('the word "SUN"\n', encoding="utf-8")
    (folder / "pictures").mkdir()
    for i in range(2):
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "pictures" / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": "a", "reward": i, "clip": -i} for i in range(2)]
    write_table(folder / "one.csv", rows, "jpeg")
    choice = {"prompt": "a", "chosen": "pictures/0.png", "rejected": ["pictures/1.png"]}
    (folder / "choices.jsonl").write_text(json.dumps(choice), encoding="utf-8")
    whole = functools.cache(loading.load_pipeline)

    def load(name, dtype, lora=None, **parts):
        parts_of_its_own = parts or lora is not None or not SHARED
        return (whole.__wrapped__ if parts_of_its_own else whole)(name, dtype, lora, **parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loading, "load_pipeline", load)
        yield folder


@pytest.fixture(scope="module")
def scored(place):
    """Rollouts of two images, with their rewards, for the trainers."""
    assert rollout.main(["--prompts=prompts.txt", "--out=run", "--images=2", *CALL]) == 0
    assert score.main(["run", "--reward", "jpeg", "--device", "cpu"]) == 0
    return "run"


STEER = ["a red star", "--steps", "4", "--particles", "2", "--num-scores", "1", "--reward", "jpeg"]
JUDGE = "--judge=judge(url=http://127.0.0.1:1/v1, model=stub)"
compared = functools.partial(functools.partial, compare.run)
SCRIPTS = {  # a command that works, and what any text may be given to
    "steer": (steer.main, [*STEER, "--out", "steered"], {"negative_prompt"}),
    "score": (score.main, ["pictures", "--prompt", "a", "--reward", "jpeg"], {"prompt"}),
    "app": (app.main, [], {"lora", "reward", "host"}),  # those are for the page to refuse
    "compare_agreement": (compared("agreement"), ["--table=one.csv"], set()),
    "compare_wins": (compared("wins"), ["--table=one.csv", "--baseline=one.csv"], set()),
    "compare_preferences": (
        compared("preferences"),
        ["--file=choices.jsonl", "--reward=jpeg(incompressibility)"],
        set(),
    ),
    "compare_tournament": (
        compared("tournament"),
        ["--images=pictures", "--prompt=a", JUDGE],
        {"prompt"},
    ),
    "rollout": (
        rollout.main,
        ["--prompts=prompts.txt", "--out=rolled", "--images=2", *CALL],
        set(),
    ),
    "evaluate": (
        evaluate.main,
        ["--prompts=prompts.txt", "--out=eval", "--reward=jpeg", "--images=1", *CALL],
        set(),
    ),
    "train_gdro": (
        gdro.main,
        ["--rollouts=run", "--out=gdro", "--gdro.steps=1", "--gdro.k=2"],
        set(),
    ),
    "train_adversarial": (
        online.main,
        ["--prompts=prompts.txt", "--out=online", "--reward=jpeg", "--model=tiny-sd3", *SHORT],
        {"negative_prompt"},
    ),
    "train_critic": (
        critic.main,
        ["--rollouts=run", "--out=critic", "--references=pictures", "--steps=1", *ALONE],
        set(),
    ),
}
SETTINGS = {script: OPTIONS[script.replace("_", " ")] for script in SCRIPTS}
# Settings that only serve beside others, by how their names begin: what is set with them.
BESIDE = {
    "train_gdro check.": ["--check.every=1", "--check.prompts=other.txt", "--check.images=1"],
    "train_adversarial check.": [
        "--check.every=1",
        "--check.prompts=other.txt",
        "--check.images=1",
    ],
    "train_adversarial nft.": ["--method=nft", *USUAL, *(w.replace("grpo", "nft") for w in SHORT)],
    "train_adversarial awm.": ["--method=awm", *USUAL, *(w.replace("grpo", "awm") for w in SHORT)],
    "train_adversarial references": ["--references=pictures", "--no-paired"],
    "train_adversarial tower": ["--references=pictures", "--no-paired"],
    "train_adversarial critic": ["--references=pictures", "--no-paired"],
    "evaluate embed": ["--images=2"],
    "evaluate steer": ["--particles=2"],
    "evaluate particles": ["--steer=jpeg"],
    "evaluate filter": ["--steer=jpeg", "--particles=2"],
    "rollout filter": ["--reward=jpeg", "--steered=2"],
    "rollout reward": ["--steered=2"],
}


def calls() -> list[tuple[str, str, str]]:
    return [
        (script, flag, value)
        for script, options in SETTINGS.items()
        for key, value in of_settings(options.kind, SCRIPTS[script][2])
        if (flag := options.flags().get(key, "")).startswith("--")
    ]


def marked(every: list, quick: int = EVERY) -> list:
    return [
        pytest.param(*call, marks=[] if i % quick == 0 else [pytest.mark.slow], id=repr(call)[:60])
        for i, call in enumerate(every)
    ]


LIGHT = {script for script in SCRIPTS if script in ("score", "app") or "compare" in script}
QUICK = [call for call in calls() if call[0] in LIGHT]
SLOW = [call for call in calls() if call[0] not in LIGHT]


def test_there_are_enough():
    assert len(calls()) + len(ARGUMENTS) > 500
    assert {script for script, *_ in calls()} == set(SCRIPTS)


def clean() -> None:
    """Take away what a call that was not refused has made."""
    for made in ("steered", "rolled", "eval", "gdro", "online", "critic"):
        shutil.rmtree(made, ignore_errors=True)
    for made in Path("pictures").glob("scores.csv*"):
        made.unlink()


def refused(script: str, option: str, value: str) -> None:
    main, base, _ = SCRIPTS[script]
    clean()
    SHARED[:] = [True] * (not script.startswith("train"))
    plain = option.removeprefix("--").replace("-", "_")
    for begins, words in BESIDE.items():
        base = [*base, *words] if f"{script} {plain}".startswith(begins) else base
    status, lines = said(main, [*base, f"{option}={value}"])
    assert status == 2, (status, lines)
    (line,) = lines
    assert line.startswith(f"tilt {script.replace('_', ' ')}: ")
    assert len(line) < 2000
    name, shown = option.rpartition(".")[2], " ".join(value.strip("[]{} ").split())[:12]
    assert name in line or (shown and shown in line) or repr(value)[1:9] in line, line


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - {"app", "compare_tournament"}))
def test_the_commands_themselves_work(scored, script):
    main, base, _ = SCRIPTS[script]
    clean()
    SHARED[:] = [True] * (not script.startswith("train"))
    assert said(main, base)[0] == 0


@pytest.mark.parametrize(("script", "option", "value"), marked(QUICK))
def test_an_option_is_refused(place, script, option, value):
    refused(script, option, value)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "option", "value"), marked(SLOW))
def test_a_setting_is_refused(scored, script, option, value):
    refused(script, option, value)


def base_of(function):
    """Arguments with which each public function works."""
    pipe, keywords = family("sd")
    steered = {"pipe": pipe, "prompts": "a", "reward": brightness, "particles": 2} | keywords
    chain = {"x": torch.zeros(1, 2), "kernel": gaussian_kernel, "reward": linear, "num_steps": 20}
    images = {"images": torch.zeros(1, 3, 8, 8), "prompts": ["a"]}
    return {
        FeynmanKac: {},
        pipeline.steer: steered | {"progress": False},
        pipeline.steer_each: steered | {"progress": False},
        particle_filter: chain | {"settings": FeynmanKac(), "generator": seeded()},
        generators: {"seed": 0, "prompts": ["a"], "k": 1},
        stochastic: {"scheduler": DDIMScheduler()},
        rewards.load: {"reward": "jpeg"},
        JPEG.__call__: images,
        JPEG.evaluate: images,
        JPEG.check: {"prompts": ["a"]},
    }[function]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


JPEG = rewards.load("jpeg")
PUBLIC = [
    FeynmanKac, pipeline.steer, pipeline.steer_each, particle_filter, generators, stochastic,
    rewards.load, JPEG.__call__, JPEG.evaluate, JPEG.check,
]  # fmt: skip
ARGUMENTS = [
    (f, name, value)
    for f in PUBLIC
    for name, value in of_signature(f)
    if name != "reward_scale" or type(value) not in (int, float) or value != -3  # steers away
]


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        pytest.param(f, name, v, marks=[] if i % EVERY == 0 else [pytest.mark.slow],
                     id=f"{f.__name__}-{name}-{v!r:.20}-{i}")
        for i, (f, name, v) in enumerate(ARGUMENTS)
    ],
)  # fmt: skip
def test_an_argument_is_refused(function, name, value):
    with within(100), pytest.raises(ValueError, match=r"(?s).") as error:
        function(**base_of(function) | {name: value})
    assert "\n" not in str(error.value).strip()


def test_every_public_function_is_among_them():
    import steering

    results = {"Population", "Transition", "Steered"}  # what they give, not what they are given
    known = {f.__name__ for f in PUBLIC}
    assert set(steering.__all__) - results <= known
    assert Steered


FILES = {
    "bytes": b"\x80\x81\xff", "utf-16": "a red star\n".encode("utf-16"), "nul": b"\0" * 100,
    "utf-16-le": "a red star".encode("utf-16-le"), "empty": b"", "blank": b"\n \n\t\n",
    "huge line": b"a" * 200_000, "array": b"[1]", "deep": b"[" * 100_000, "null": b"null",
    "digits": b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "no text": b'{"prompt": 5}',
    "seed": b'{"prompt": "a", "seed": 9223372036854775808}',
    "minus": b'{"prompt": "a", "seed": -1}',
    "references": b'{"prompt": "a", "references": 5}', "half": b'{"prompt": "a"',
    "long": json.dumps({"prompt": "a", "references": [LONG]}).encode(),
    "name": b'{"prompt": "a", "references": ["a\\u0000"]}', "key": b'{"prompt": "a", "sed": 1}',
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_prompts_is_refused_by_name(place, name):
    file = place / "bad.jsonl"
    file.write_bytes(FILES[name])
    for main, words in (
        (steer.main, [*STEER[1:], "--prompt-file", "bad.jsonl"]),
        (rollout.main, ["--prompts=bad.jsonl", "--out=rolled"]),
        (score.main, ["bad.jsonl", "--reward", "jpeg", "--prompt", "a"]),
    ):
        status, lines = said(main, words)
        assert (status, len(lines)) == (2, 1), lines
        assert "bad.jsonl" in lines[0]
        assert len(lines[0]) < 600


@pytest.mark.parametrize(
    "part", [b"", b"[]", b"3\n", b'{"reward": 5}', b'{"reward": "jpeg"}\n[]\n', b"\xff", b"{"]
)
@pytest.mark.parametrize("name", ["bad.csv.part", "bad.csv", "bad.parquet", "bad.csv.spec"])
def test_a_damaged_table_is_refused_by_name(place, name, part):
    for old in place.glob("bad.*"):
        old.unlink()
    (place / name).write_bytes(part)
    table = "bad.parquet" if "parquet" in name else "bad.csv"
    if name.endswith(".spec"):
        (place / table).write_text("image,prompt,reward\n", encoding="utf-8")
    words = ["pictures", "--prompt", "a", "--reward", "jpeg", "--out", table, "--resume"]
    status, lines = said(score.main, words)
    if status != 0:  # an empty one is as none at all
        assert (status, len(lines)) == (2, 1), lines
        assert "bad." in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["steer", "a", "--reward", "broken:reward"],
        ["steer", "a", "--reward-scale", "1e39", "--reward", "jpeg"],
        ["steer", "a", "--device", "meta", "--reward", "jpeg"],
        ["steer", "a", "--particles", "10000000", "--reward", "jpeg"],
        ["steer", "a", "--steps", "100000000", "--reward", "jpeg"],
        ["score", "nowhere", "--reward", "jpeg"],
        ["app", "--port", "99999"],
        ["evaluate", "--prompts=prompts.txt", "--out=e", "--reward=jpeg", "--dtype=foo"],
        ["rollout", "--prompts=prompts.txt", "--out=r", "--dtype=float64"],
        ["rollout", "--prompts=prompts.txt", "--out=r", "--call.guidance-scale=high"],
        ["train_gdro", "--rollouts=nowhere", "--out=t"],
        ["score", "a.png", "--prompt", "a", "--reward", "jpeg", "--calibrate", "~no-such-user/c"],
    ],
    ids=" ".join,
)
def test_a_process_says_one_line(place, words):
    (place / "broken.py").write_text("def reward(:\n", encoding="utf-8")
    script = Path(__file__).parents[1] / "scripts" / f"{words[0]}.py"
    command = [sys.executable, script, *words[1:]]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if ": loading" not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"tilt {words[0].replace('_', ' ')}: ")


def test_the_campaign_notices(monkeypatch):
    """What would be found: a traceback, a hang, a value that is accepted."""
    for main in (lambda words: 0, lambda words: 1 / 0):
        monkeypatch.setitem(SCRIPTS, "steer", (main, [], set()))
        with pytest.raises((AssertionError, ZeroDivisionError)):
            refused("steer", "--steps", "0")
    with pytest.raises(malformed.Hang), within(1):
        time.sleep(5)
