"""Everything that needs a GPU, in one command and one Markdown file.

    python -m scripts.bench gpu --out gpu.md
    python -m scripts.bench gpu --only parity cost

It is meant to take under eight minutes on one card of the H100's class; no card has run it yet. The
sections cost, attention, memory and training use networks of published sizes with random weights in
bfloat16; parity and commands use the embedded models, as all do with `--device cpu`, which tries
the command. The file is written section by section, so that results are kept if a later section
fails; then the error stands in the file, and the exit status is 1.
"""

import contextlib
import gc
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import rewards
from finetune import lora
from finetune.network import targets_of
from steering import FeynmanKac, steer, tiny
from tilt import loading

from ..parser import parser_of
from ..tables import head, line
from . import attention, cost, memory, networks, training
from .machine import about, peak

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"sd15": 28, "sdxl": 20, "sd35m": 28}
# model, method, gradient checkpointing; docs/memory.md has a row for each
MICRO_BATCHES = (
    ("sd15", "gdro", True),
    ("sdxl", "gdro", True),
    ("sd35m", "gdro", False),
    ("sd35m", "gdro", True),
)
WORDS = 'the word "CRAB"\nthe word "HIVE"\nthe word "SOAP"\n'
# run one after another in one folder; --dtype auto is bfloat16 on CUDA
COMMANDS = (
    "tilt rollout --prompts words.txt --out words --images 8 --dtype {dtype}"
    " --call.guidance-scale 1.0",
    "tilt score words --reward ocr",
    "tilt train gdro --config scripts/configs/gdro_tiny.yaml"
    " --rollouts words --out tuned --dtype {dtype} --gdro.steps 4",
    "tilt train adversarial --config scripts/configs/grpo_tiny.yaml"
    " --prompts words.txt --reward ocr --out online --dtype {dtype} --grpo.steps 2",
    "tilt evaluate --prompts words.txt --out judged --lora tuned/lora --reward ocr --images 2"
    " --dtype {dtype} --call.guidance-scale 1.0",
    "tilt steer --prompt-file words.txt --lora online/lora --reward ocr --out steered"
    " --particles 4 --dtype {dtype}",
)


def parity(device: torch.device) -> None:
    """Unsteered latents against the pipeline's own call: equal bits, and the largest difference."""
    print(head("model", "dtype", "particles", "equal bits", "largest difference"))
    for model in tiny.NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            pipe, keywords, _ = cost.subject(model, device, dtype)
            for k, scale in ((4, 0.0), (1, 10.0)):
                settings = FeynmanKac(reward_scale=scale)
                given = (pipe, [cost.PROMPT], rewards.load("jpeg", device), k, settings)
                ours = steer(*given, progress=False, **keywords).latents[0]
                theirs = cost.plain(pipe, keywords, k)(output_type="latent")[0].cpu()
                off = (ours.float() - theirs.float()).abs().max().item()
                equal = "yes" if torch.equal(ours, theirs) else "NO"
                print(line(model, str(dtype).removeprefix("torch."), k, equal, f"{off:.1e}"))


def steered(device: torch.device) -> None:
    """Steered over plain: k = 8, four scores, preview decoder, on a GPU CLIP ViT-B/32's size."""
    small = ["--model", *tiny.NAMES, "--steps", "4", "--pairs", "1"]
    words = [["--model", name, "--steps", str(n), "--pairs", "5"] for name, n in STEPS.items()]
    large = ["--reward", "clip(source=random:0)", "--device", str(device), "--dtype", "bfloat16"]
    cuda = device.type == "cuda"
    for chosen in words if cuda else [small]:
        scored = ["--num-scores", "4", "--decoder", "preview"]
        cost.main([*chosen, *scored, *(large if cuda else [])])
        release()


def backends(device: torch.device) -> None:
    """Each attention backend over PyTorch's own: 16 rows, 4 for Flux, and 1 on a CPU."""
    if device.type == "cpu":
        attention.main(["--device", "cpu", "--rows", "1", "--rounds", "1"])
        return
    for name in attention.PUBLISHED:
        rows = "4" if name == "flux" else "16"
        words = ["--networks", name, "--rows", rows, "--rounds", "5", "--dtype", "bfloat16"]
        attention.main([*words, "--device", str(device)])
        release()


def micro_batches(device: torch.device) -> None:
    """GB of a training micro-batch, computed (docs/memory.md) and measured by the allocator."""
    if device.type != "cuda":
        print("PyTorch's allocator on a CPU keeps no peak: nothing to compare with.")
        return
    print(head("model", "side", "method", "checkpointing", "k", "computed GB", "measured GB"))
    for name, method, less in MICRO_BATCHES:
        k = memory.METHODS[method][0]
        print(f"{documented(name, method, less)} {held(name, less, k, device):.2f} |", flush=True)
        release()


def documented(name: str, method: str, less: bool) -> str:
    """The row of docs/memory.md up to the GB of a group, which take minutes to compute."""
    pattern = rf"^\| {name} \| \d+ \| {method} \| {'yes' if less else 'no'} \| \d+ \| [\d.]+ \|"
    found = re.search(pattern, (ROOT / "docs/memory.md").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/memory.md has no row of {name}, {method}, checkpointing {less}")
    return found[0]


def held(name: str, less: bool, images: int, device: torch.device) -> float:
    """The most GB that one group's forward and backward passes of GDRO hold on the device."""
    model = networks.MODELS[name]
    network = networks.filled(lambda: networks.network_of(model), device, torch.bfloat16)
    weights = lora.attach(network, targets_of(network), 32, 32, torch.Generator())
    if less:
        network.enable_gradient_checkpointing()
    kept = [torch.zeros_like(weight) for weight in weights.values() for _ in range(3)]
    with peak(device) as most, torch.device(device):
        for _ in range(2):  # the second has gradients left by the first, as in a run
            memory.step(network, model, images, True, device.type)
    del kept
    return most.gigabytes


def trained(device: torch.device) -> None:
    """A step of each trainer over the calls of its network alone."""
    cuda = device.type == "cuda"
    words = ["--device", str(device), "--pairs", "4" if cuda else "2"]
    for model, method in itertools.product(STEPS if cuda else ("tiny-sd",), training.METHODS):
        training.main(["--model", model, *words, "--method", method])
        release()


def commands(device: torch.device) -> None:
    """The documented commands in half precision, from prompts to pictures steered with a LoRA."""
    print(head("command", "seconds", "ended"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scripts").symlink_to(ROOT / "scripts")
        (Path(folder) / "words.txt").write_text(WORDS)
        for command in COMMANDS:
            start, words = time.monotonic(), command.format(dtype="bfloat16").split()
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            said = done.stderr.strip().splitlines()
            ended = f"{done.returncode}: {said[-1:]}" if done.returncode else "well"
            print(line(f"`{' '.join(words)}`", f"{time.monotonic() - start:.0f}", ended))
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-3000:]}")


def tests(device: torch.device) -> None:
    """The last line of `pytest -m gpu`."""
    if importlib.util.find_spec("pytest") is None or device.type != "cuda":
        print("They need CUDA and pytest.")
        return
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])


SECTIONS: dict[str, Callable[[torch.device], None]] = {
    "parity": parity,
    "cost": steered,
    "attention": backends,
    "memory": micro_batches,
    "training": trained,
    "commands": commands,
    "tests": tests,
}


def release() -> None:
    """Free what the last network held, so that the next has the card to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Tee(io.TextIOBase):
    """Writes to the terminal and to the end of a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.terminal = file, sys.stdout

    def write(self, text: str) -> int:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(text)
        self.terminal.write(text)
        self.terminal.flush()
        return len(text)


def section(name: str, device: torch.device) -> bool:
    """Print a section; whether it succeeded."""
    function, start, well = SECTIONS[name], time.monotonic(), True
    print(f"\n\n## {name}\n\n{function.__doc__}\n")
    try:
        function(device)
    except Exception:  # the other sections can still succeed
        well = False
        print(f"\nThis section failed:\n\n```\n{traceback.format_exc()}```")
    print(f"\n{time.monotonic() - start:.0f} s")
    release()
    return well


def main(argv: list[str] | None = None) -> None:
    """Run the sections and write the file."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="gpu.md by default")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    try:
        device = loading.pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    args.out.write_text("", encoding="utf-8")
    with contextlib.redirect_stdout(Tee(args.out)):
        print(f"# Results on a GPU\n\n{about(device, dtype)}")
        well = [section(name, device) for name in args.only]
    sys.exit(0 if all(well) else 1)
