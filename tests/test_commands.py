"""The commands of the README and docs/ are run: as they stand, but smaller.

A page's commands run one after another in a folder of its own, in a shell. The published models
that they name are folders there of those names, with random weights; rewards whose weights are
downloaded become the embedded ones. What `.ci/run` or another test runs is only
found there, and what takes long is parsed by test_configs.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
from pages import INDENTED, PAGES, ROOT, SPAN, blocks, prose
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from zoo.accounts import ANIMALS
from zoo.building import Animal, pipeline_of

from scripts import bench
from scripts.benchmarks import frontier, tuning
from scripts.tiny import styles

pytestmark = pytest.mark.slow  # each begins a process of its own

# what makes a command's work small; the last of two equal options counts
SMALL = {
    "steer": "--steps 6",
    "rollout": "--images 4 --call.num-inference-steps 2",
    "train gdro": "--gdro.steps 2 --gdro.groups 2 --gdro.k 2 --gdro.micro-groups 1 --log-every 1",
    "train adversarial": "--grpo.steps 2 --grpo.groups 2 --grpo.k 2 --grpo.micro-groups 1"
    " --grpo.num-inference-steps 3",
    "train critic": "--steps 2 --batch 2",
    "evaluate": "--images 2 --call.num-inference-steps 6",
}
# as on a GPU, where --dtype auto is it; a command that trains has nothing else that says so
HALF = dict.fromkeys(
    ["steer", "rollout", "train gdro", "train adversarial", "evaluate"], "--dtype bfloat16"
)
SMALLER = "--tower tiny --call.height 16 --call.width 16"
ALSO = {"recipes.md": {"train adversarial": SMALLER}}
REWARDS = {"pickscore": "jpeg", "clip": "clip(tiny)", "aesthetic": "aesthetic(tiny)"}
MODELS: dict[str, Callable] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_pipelines.sd,
    "stabilityai/stable-diffusion-xl-base-1.0": tiny_pipelines.sdxl,
    "stabilityai/stable-diffusion-3.5-medium": tiny_pipelines.sd3,
    "path/to/my-pipeline": tiny_pipelines.sd,
}
LARGER = {
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "black-forest-labs/FLUX.2-klein-4B": "Flux2KleinPipeline",
    "Tongyi-MAI/Z-Image": "ZImagePipeline",
    "Qwen/Qwen-Image": "QwenImagePipeline",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "WanPipeline",
}
OF_LARGER = re.compile(r"runs/(flux|klein|zimage|qwen|wan)\b")  # in bfloat16 alone, for time
# what its model_index.json and the configs of its scheduler and decoder say, apart from sizes
WAN22 = Animal(
    {
        "scheduler": ("UniPCMultistepScheduler", {"flow_shift": 5.0}),
        "transformer": {"in_channels": 48, "out_channels": 48},
        "vae": {"z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True}
        | {"dim_mult": [1, 2, 4, 4], "patch_size": 2, "scale_factor_spatial": 16}
        | {"decoder_base_dim": 4, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
    },
    {"expand_timesteps": True},
)
MODELS |= {
    name: partial(
        pipeline_of, kind, {"WanPipeline": WAN22}.get(kind) or ANIMALS.get(kind, Animal())
    )
    for name, kind in LARGER.items()
}
FOLLOWING = "tests/test_following.py"
# what is not run here: the file that runs it, and how that reads there
ELSEWHERE = {
    r"^make app|^tilt app": ("tests/test_app_browser.py", r"\"scripts/app\.py\""),
    r"^make ([\w-]+)": (".ci/run", r"^make (?:[\w-]+ )*{}(?: |$)"),
    r"^source \.venv/bin/activate|^pip install -e \.": ("Makefile", r"pip install .*--editable"),
    # jobs that wait for one another
    r"^tilt train gdro .*--follow\b": (
        FOLLOWING,
        r"trained\(run, whole, \"--follow=3",
    ),
    r"^tilt rollout .*--follow\b": (FOLLOWING, r"\*PLAN, f\"--follow="),
    r"^tilt score .*--reward .*--follow\b": (
        FOLLOWING,
        r"\"--reward\", .*\"--follow\"",
    ),
    r"^tilt train adversarial .* runs/(?:flux|zimage|wan)-online ": (  # for time
        "tests/test_configs.py",
        "commands_of_the_recipes_are_understood",
    ),
    r"^tilt serve ": ("tests/test_serve_restarted.py", r"\"tilt\", \"serve\", spec"),
    r"^tilt .*remote\(http": ("tests/test_serve_restarted.py", r"\"--reward\", f\"remote\("),
    r"^pip install deepspeed$": ("tests/test_launch_deepspeed.py", r"reason=\"needs deepspeed\""),
    r"^\.venv/bin/python -m pytest ": ("Makefile", r"-m pytest -q -n "),
    r"^PYTHONPATH=tests python -m zoo$": ("tests/test_zoo.py", r"assert row\(name\) == TABLE"),
    r"^PYTHONPATH=tests python -m zoo\.training$": (
        "tests/test_trainable.py",
        r"assert row\(name\) == TABLE",
    ),
    r"^accelerate launch --config_file .*/(fsdp|deepspeed|gpus)\.yaml": (
        "tests/test_configs.py",
        "{}",
    ),
}
# a word of the shell that holds a reward, in quotes or none
SPEC = re.compile(r"""--reward (?:"[^"]*"|'[^']*'|\S+)""")
COMMAND = re.compile(r"(\w+=\S+ )*(make|python|tilt|accelerate|pip|source|\S+/python|for|printf) ")
FRAGMENT = re.compile(r"\.\.\.|--help|^accelerate launch( scripts/steer\.py)?$|^tilt( train)? \w+$")
BENCHES = {
    "closed-forms": "--runs 20",
    "lift": "--prompts 2 --particles 2 --seeds 0",
    "frontier": "--prompts 2",
    "foresight": "--prompts 2 --particles 2",
    "explain": "",
    "showcase": "--prompts 2 --particles 2 --steps 8",
    "cost": "--model tiny-sd --device cpu --dtype float32 --pairs 1 --particles 2 --steps 4"
    " --num-scores 2",
    "speed": "--pairs 3 --only clip",
    "soak": "--prompts 2 --particles 1 --steps 3",
    "attention": "--networks tiny-sd --rows 1 --rounds 1",
    "gpu": "--device cpu --only parity cost attention memory training",
    "processes": "--pairs 1 --prompts 2",
    "rewards": "--pairs 1 --clip tiny",
    "remote": "--pairs 1 --images 8 --sides 64 --rewards jpeg",
    "training": "--model tiny-sd3 --device cpu --pairs 2",
    "tuning": "--images 4 --test-images 2 --processes 1",
    "online": "--every 2",
    "memory": "--models sd15",
    "adversarial": "--images 2",
    "scale": "",
}
PROMPTS = ['the word "CAT"', 'the word "SUN"']
UNSEEN = ['the word "HAT"', 'the word "BOX"']
SHAPES = ["two stars", "a green circle"]
# what a page takes to be there, and what stands for it
EARLIER = {
    "evaluate.md": {"runs/tuned": "tuned"},
    "adversarial.md": {"runs/a": "a", "runs/adversarial/style-with-a-critic/lora": "tuned/lora"},
}


def lines(page: Path) -> list[str]:
    """The page's command lines in order, those in running text last; a loop is one."""
    text = page.read_text(encoding="utf-8")
    found = [body for language, body in blocks(text) if language == "bash"]
    found += [textwrap.dedent(block[1]) for block in INDENTED.finditer(prose(text))]
    every = [line for body in found for line in statements(body)]
    every += [" ".join(span.split()) for span in SPAN.findall(prose(text))]
    return [line for line in every if COMMAND.match(line) and not FRAGMENT.search(line)]


def statements(body: str) -> list[str]:
    """A block's statements, each on one line and without its comment."""
    body = re.sub(r"\\\n *", "", body)
    body = re.sub(r"^(for .*)\n((?: .*\n)+)(done.*)$", _loop, body, flags=re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", line) for line in body.splitlines() if line.strip()]


def _loop(found: re.Match[str]) -> str:
    first, *rest = (line.strip() for line in found[0].splitlines())
    return " ".join([first, *(f"{line};" for line in rest[:-1]), rest[-1]])


def elsewhere(line: str) -> bool:
    """Whether it is run by another file, which is looked into."""
    for pattern, (file, reads) in ELSEWHERE.items():
        if found := re.match(pattern, line):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(reads.format(*found.groups()), text, re.MULTILINE), f"{file}: {line}"
            return True
    return False


def todo(page: Path) -> list[str]:
    """The page's lines that are run here."""
    return [line for line in lines(page) if "scripts.bench " not in line and not elsewhere(line)]


def small(line: str, page: str, half: bool = False) -> str:
    """The same command with little to do, and in half precision where that is asked for."""
    found = re.match(r"tilt ((?:train )?\w+)", line)
    name = found[1] if found else ""
    line = SPEC.sub(_embedded, line)
    line = re.sub(r"--call\.(height|width) (512|1024)", r"--call.\1 16", line)
    line = re.sub(r"--call\.(height|width) 640", r"--call.\1 32", line)
    line = line.replace("--call.num-frames 33", "--call.num-frames 5")
    if name and "FLUX.2-klein" in line:  # the small encoder has few layers
        line += " --call.text-encoder-out-layers [1]"
    more = [SMALL.get(name, ""), ALSO.get(page, {}).get(name, "")]
    if "/nft_" in line:
        more = [option.replace("--grpo.", "--nft.") for option in more]
    more += [HALF.get(name, "")] if half else []
    more += ["--check.images 1"] if "--check.prompts " in line else []
    return " ".join([line, *more])


def _embedded(found: re.Match[str]) -> str:
    spec = found[0].replace("ocr(mode=flow_grpo)", "jpeg")  # random weights write nothing
    return re.sub(rf"\b({'|'.join(REWARDS)})\b(?!\()", lambda name: REWARDS[name[1]], spec)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The published names as folders, and a LoRA for one."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        build().save_pretrained(folder / name)
    pipe = tiny_pipelines.sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers: Any = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder / "path/to/my-lora", unet_lora_layers=layers)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Scored rollouts in a/ and what was trained on them in tuned/."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "shapes.txt").write_text("".join(f"{prompt}\n" for prompt in SHAPES))
    for line in (
        "tilt rollout --prompts shapes.txt --out a --call.guidance-scale 1.0",
        "tilt score a --reward objects",
        "tilt train gdro --rollouts a --out tuned",
    ):
        run(small(line, ""), folder)
    return folder


@pytest.fixture
def folder(tmp_path, models) -> Path:
    """What commands expect to find: the scripts, files of prompts, pictures and models."""
    for name in ("scripts", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in {name.split("/")[0] for name in MODELS}:
        (tmp_path / name).symlink_to(models / name)
    texts = {"prompts": PROMPTS, "words": PROMPTS, "unseen": UNSEEN, "shapes": SHAPES}
    texts["checks"] = UNSEEN
    texts["runs/online/words-test"] = UNSEEN
    (tmp_path / "runs/online").mkdir(parents=True)
    for name, prompts in texts.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    styles.main(["paper", "--out", str(tmp_path / "pictures"), "--count", "4"])
    names = sorted(file.name for file in (tmp_path / "pictures").glob("*.png"))
    rows = [{"file_name": name, "prompt": "a star"} for name in names]
    (tmp_path / "pictures/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"image": f"pictures/{name}", "prompt": "a star"} for name in names]
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(line: str, folder: Path) -> None:
    """In a shell of that folder, offline, on one thread of the CPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    more |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", list(filter(todo, PAGES)), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, folder, results):
    for name, made in EARLIER.get(page.name, {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(results / made)
    for line in todo(page):
        if not OF_LARGER.search(line):
            run(small(line, page.name), folder)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any("tilt train " in x for x in todo(p))], ids=lambda p: p.name
)
def test_the_commands_of_a_page_that_trains_run_in_bfloat16(page, folder, results):
    for name, made in EARLIER.get(page.name, {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(results / made)
    every = todo(page)
    assert not [line for line in every if "--mixed_precision" in line]
    for line in every:
        run(small(line, page.name, half=True), folder)


def benches() -> dict[str, list[str]]:
    """The options that each benchmark is called with, every different one once."""
    found: dict[str, list[str]] = {}
    for line in [line for page in PAGES for line in lines(page)]:
        if called := re.search(r"scripts\.bench ([\w-]+)(.*)", line):
            found.setdefault(called[1], []).append(called[2])
    return {name: list(dict.fromkeys(options)) for name, options in found.items()}


def test_every_benchmark_is_named_in_the_documentation():
    assert set(benches()) == set(bench.COMMANDS) == set(BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_the_benchmarks_that_are_named_run(name, tmp_path, monkeypatch):
    def little(script: str, words: Sequence[str], processes: int) -> list[str]:
        name = script.removesuffix(".py").replace("_", " ")
        checked = any(word.startswith("--check.prompts=") for word in words)
        less = ["--check.images=1"] if checked else []
        return command(script, [*words, *shlex.split(SMALL.get(name, "")), *less], processes)

    command, points = tuning.command, frontier.points
    few = {"best of 16", "FK 16", "funnel 8 to 2"}
    kept = lambda guided: {name: p for name, p in points(guided).items() if name in few}  # noqa: E731
    monkeypatch.setattr(frontier, "points", kept)
    monkeypatch.setattr(tuning, "COUNTS", dict.fromkeys(tuning.COUNTS, (2, 2)))
    monkeypatch.setattr(tuning, "command", little)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for options in benches()[name]:
        try:
            bench.main([name, *shlex.split(options), *shlex.split(BENCHES[name])])
        except SystemExit as left:  # 1: --against found something that got slower
            if left.code and not (left.code == 1 and "--against" in options):
                raise
