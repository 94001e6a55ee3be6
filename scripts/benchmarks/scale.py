"""What steering costs at published sizes and on many GPUs: computed, not measured.

    python -m scripts.bench scale --tables cost rewards --reward vit-h

docs/scale.md explains the tables. Notation: k particles, T steps, n scored steps of a run, R GPUs;
c_U is the cost of a row of the network, c_D of a preview, c_V of the decoder, c_R of the reward.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rewards import load

from ..parser import parser_of
from ..tables import table
from . import flops
from .rewards import pictures

TFLOP = 1e12
REWARDS = ("clip-l", "vit-h", "imagereward", "dinov2-l")
CASES = (("sd15", 512), ("sdxl", 1024), ("sd35m", 1024), ("flux-dev", 1024))
LARGE = CASES[1:3]  # of the tables of many GPUs
LATENTS = {"sd15": 4, "sdxl": 4, "sd35m": 16, "flux-dev": 16}  # channels, at an eighth of the side
NODE = 8  # GPUs that NVLink joins
OCR = {512: 0.11, 1024: 0.24}  # core-seconds a picture
TABLES = ("assumed", "operations", "cost", "exchange", "prompts", "populations", "rewards")


@dataclass(frozen=True)
class Assumed:
    """The assumptions behind the seconds; ASSUMED says where each value is from."""

    peak: float = 989e12  # operations a second
    share: float = 0.35  # of the peak that is reached, by every network
    few_rows: float = 0.9  # of a large batch's speed a row, where a call has two rows
    hbm: float = 0.7 * 3.35e12  # bytes a second
    nvlink: float = 0.8 * 450e9  # bytes a second and direction
    infiniband: float = 0.8 * 50e9
    hop: float = 5e-6  # seconds, NVLink
    far_hop: float = 10e-6  # seconds, between nodes
    call: float = 100e-6  # seconds to start one collective
    spread: float = 0.02  # standard deviation of equal GPUs' seconds for equal work
    start: float = 60.0  # seconds of a process before its first prompt
    question: int = 150  # tokens that a judge reads beside the picture
    answer: int = 64  # tokens that it writes

    def seconds(self, operations: float) -> float:
        return operations / (self.peak * self.share)


ON = Assumed()
SHEET = "data sheet; assumed"
FAL = (
    "fal-ai's stable-diffusion-benchmarks, an A100 (312 TFLOP/s), diffusers with SDPA, one picture "
    "in 50 steps: SDXL 5.93 s, which by the next table is 0.37; Stable Diffusion 1.5 1.60 s, 0.17"
)
ASSUMED = (
    ("GPU", "H100 SXM: 989 TFLOP/s in bfloat16, 3.35 TB/s", "NVIDIA's data sheet, not sparse"),
    ("share of the peak", f"{ON.share}, for every network alike", FAL),
    ("calls of two rows", f"{ON.few_rows} of a large batch's speed a row", "assumed"),
    ("share of memory's bandwidth", "0.7", "assumed"),
    ("NVLink, 8 GPUs", "450 GB/s a direction, 0.8 of it reached, 5 us a hop", SHEET),
    ("InfiniBand", "400 Gb/s a GPU, 0.8 of it reached, 10 us a hop", "DGX H100's sheet; assumed"),
    ("a collective's start from Python", f"{1e6 * ON.call:.0f} us", "assumed"),
    ("equal work on equal GPUs", f"standard deviation of {ON.spread:.0%}", "assumed"),
    ("a process before its first prompt", f"{ON.start:.0f} s", "assumed"),
    (
        "OCR on a CPU",
        f"{OCR[1024]} core-seconds a picture of 1024 x 1024, {OCR[512]} at 512",
        "measured, RapidOCR on the embedded world's words: `--ocr` (again: 0.28 and 0.12)",
    ),
    (
        "judge",
        f"Qwen2.5-VL-7B, {ON.question} tokens of question, {ON.answer} of answer or 1",
        "assumed",
    ),
)


@dataclass(frozen=True)
class Particle:
    """Operations of one particle for a step, a preview and the decoder, and of a prompt's texts."""

    step: float
    preview: float
    decoder: float
    texts: float


def particle(name: str, side: int) -> Particle:
    rows = 2 if flops.PUBLISHED[name].guided else 1
    return Particle(
        rows * flops.of_network(name, side).flops,
        flops.of_decoder(name, side, True).flops,
        flops.of_decoder(name, side, False).flops,
        rows * flops.of_texts(name).flops,
    )


def ratio(one: Particle, reward: float, steps: int, scores: int, preview: bool) -> float:
    """Cost over that of k plain samples: 1 + [n (c_D + c_R) + c_R] / (2 T c_U + c_V)."""
    look = one.preview if preview else one.decoder
    return 1 + (scores * (look + reward) + reward) / (steps * one.step + one.decoder)


def received(k: int, ranks: int, numbers: int, width: int) -> float:
    """Bytes that a rank receives at one resampling: (R - 1)/R k (2 e s + 4).

    That is e numbers of s bytes each for the sample and for the network's output, and a float32
    reward.
    """
    return (ranks - 1) / ranks * k * (2 * numbers * width + 4)


def exchange(k: int, ranks: int, numbers: int, width: int) -> float:
    """Seconds of the three ring all-gathers of one resampling: R - 1 hops each."""
    near = ranks <= NODE
    hop, speed = (ON.hop, ON.nvlink) if near else (ON.far_hop, ON.infiniband)
    return 3 * (ON.call + (ranks - 1) * hop) + received(k, ranks, numbers, width) / speed


def slowest(ranks: int, spread: float) -> float:
    """A bound on how much the slowest of R normal times exceeds their mean: sd sqrt(2 ln R)."""
    return spread * math.sqrt(2 * math.log(ranks)) if ranks > 1 else 0.0


def split(prompts: int, ranks: int) -> float:
    """Efficiency of N equal prompts over R ranks: N / (R ceil(N/R))."""
    return prompts / (ranks * math.ceil(prompts / ranks))


def shared(
    own: float, texts: float, k: int, ranks: int, per_score: float, scores: int, on: Assumed = ON
) -> float:
    """Efficiency of one prompt's k particles over R ranks, against one GPU with all of them.

    own: seconds of a particle; texts: of the prompt, which every rank encodes; per_score: of an
    exchange, there being one more at the end, for the pictures' rewards.
    """
    mine = math.ceil(k / ranks) * own * (1 + slowest(ranks, on.spread))
    return (k * own + texts) / (ranks * (mine + texts + (scores + 1) * per_score))


def operations() -> str:
    """TFLOP of every network, and their parameters."""
    rows = []
    for name, side in (*CASES[:2], ("sd35m", 512), *CASES[2:]):
        kinds = [flops.of_network(name, side)]
        kinds += [flops.of_decoder(name, side, preview) for preview in (False, True)]
        kinds.append(flops.of_texts(name))
        cells = [f"{kind.flops / TFLOP:.2f}" for kind in kinds]
        rows.append([name, side, f"{kinds[0].parameters / 1e9:.2f}", *cells])
    heads = ["model", "side", "parameters, 10^9", "a row of the network", "decoder", "preview"]
    first = table([*heads, "text encoders, a prompt"], rows)
    rows = []
    for name in REWARDS:
        found = flops.of_reward(name)
        rows.append([name, f"{found.parameters / 1e9:.2f}", f"{found.flops / TFLOP:.2f}"])
    for side in (512, 1024):
        sees, reads = flops.of_judge(side, ON.question)
        size, work = (sum(getattr(c, f) for c in (sees, reads)) for f in ("parameters", "flops"))
        rows.append([f"judge, {side}", f"{size / 1e9:.2f}", f"{work / TFLOP:.2f}"])
    return f"{first}\n\n{table(['reward', 'parameters, 10^9', 'a picture'], rows)}"


def cost(reward: str) -> str:
    """`ratio` for every model, T and n, by the decoder or a preview."""
    r, rows = flops.of_reward(reward).flops, []
    for name, side in CASES:
        one = particle(name, side)
        for steps in (25, 28, 50, 100):
            found = [ratio(one, r, steps, n, preview) for n in (4, 8) for preview in (False, True)]
            rows.append([name, side, steps, *(f"{x:.3f}" for x in found)])
    cases = [f"n = {n}, {decoder}" for n in (4, 8) for decoder in ("decoder", "preview")]
    return table(["model", "side", "T", *cases], rows)


def exchanged(steps: int, scores: int) -> str:
    """Bytes and milliseconds of one resampling, against the steps between two of them."""
    rows = []
    for name, side in LARGE:
        numbers = LATENTS[name] * (side // 8) ** 2
        step = ON.seconds(flops.of_network(name, side).flops * 2)
        for k, ranks in ((8, 8), (16, 8), (64, 64), (512, 512)):
            sizes = [received(k, ranks, numbers, width) / 1e6 for width in (2, 4)]
            took = exchange(k, ranks, numbers, 4)
            between = steps / (scores + 1) * step * math.ceil(k / ranks)
            own = 1e3 * step * math.ceil(k / ranks)
            cells = [*(f"{size:.2f}" for size in sizes), f"{1e3 * took:.1f}", f"{own:.0f}"]
            rows.append([name, k, ranks, *cells, f"{took / between:.2%}"])
    heads = ["model", "k", "GPUs", "MB, 16 bits", "MB, 32 bits", "ms, 32 bits", "ms of a step"]
    return table([*heads, "exchange / steps between"], rows)


def prompts(k: int, steps: int, scores: int) -> str:
    """Efficiency if each GPU draws whole prompts."""
    rows = []
    for name, side in LARGE:
        each = k * own_seconds(name, side, steps, scores)
        for count in (553, 1632, 10_000):
            for ranks in (8, 64, 512):
                turns = math.ceil(count / ranks)
                tail, slow = split(count, ranks), 1 + slowest(ranks, ON.spread)
                work = turns * each * slow
                loaded = count * each / (ranks * (work + ON.start))
                cells = [f"{x:.3f}" for x in (tail, tail / slow, loaded)]
                rows.append([name, count, ranks, turns, f"{work / 60:.1f}", *cells])
    heads = ["model", "prompts", "GPUs", "prompts a GPU", "minutes", "tail", "and unequal GPUs"]
    return table([*heads, "and 60 s of start"], rows)


def own_seconds(name: str, side: int, steps: int, scores: int, reward: str = "clip-l") -> float:
    """Seconds of one steered particle, by previews."""
    one, r = particle(name, side), flops.of_reward(reward).flops
    work = steps * one.step + one.decoder
    return ON.seconds(work * ratio(one, r, steps, scores, preview=True))


def populations(steps: int, scores: int) -> str:
    """Efficiency if one prompt's population is spread over GPUs."""
    rows = []
    for name, side in LARGE:
        own = own_seconds(name, side, steps, scores)
        texts = ON.seconds(particle(name, side).texts)
        numbers = LATENTS[name] * (side // 8) ** 2
        for k, ranks in ((8, 8), (16, 8), (12, 8), (64, 64), (128, 64), (512, 512), (16, 64)):
            took = exchange(k, ranks, numbers, 4)
            found = shared(own, texts, k, ranks, took, scores)
            few = ON.few_rows if k <= ranks else 1.0  # two rows of the network a call
            slower = shared(own / few, texts, k, ranks, took, scores) * few
            whole = k * own + texts
            cells = [f"{whole:.1f}", f"{whole / (ranks * slower):.2f}"]
            rows.append([name, k, ranks, *cells, f"{found:.3f}", f"{slower:.3f}"])
    heads = ["model", "k", "GPUs", "s on one GPU", "s on all", "efficiency"]
    return table([*heads, "and two rows slower"], rows)


def picture_seconds(reward: str, side: int, k: int) -> float:
    """Seconds of a GPU (OCR: of a core) for one of k pictures that are scored at once."""
    if reward == "ocr, a core":
        return OCR[side]
    if reward in REWARDS:
        return ON.seconds(flops.of_reward(reward).flops)
    sees, reads = flops.of_judge(side, ON.question)
    words = ON.answer if "64" in reward else 1
    at_once = 1 if "one by one" in reward else k  # a token reads the weights once
    writing = words * 2 * reads.parameters / ON.hbm / at_once
    return ON.seconds(sees.flops + reads.flops) + writing


KINDS = (
    *REWARDS,
    "ocr, a core",
    "judge, yes or no",
    "judge, 64 tokens, k at once",
    "judge, 64 tokens, one by one",
)


def placing(k: int, steps: int, scores: int) -> str:
    """What share of a run the reward takes, and whether a server for it is worth a GPU."""
    rows = []
    for name, side in CASES[:3]:
        one = particle(name, side)
        base = ON.seconds(steps * one.step + one.decoder + scores * one.preview)
        for reward in KINDS:
            r = (scores + 1) * picture_seconds(reward, side, k)
            each = 1e3 * r / (scores + 1)
            cells = [name, reward, f"{base:.2f}", f"{each:.1f}", f"{r / (base + r):.1%}"]
            if reward.startswith("ocr"):
                rows.append([*cells, "-", "-", math.ceil(r / (0.05 * base))])
            else:
                rows.append([*cells, f"{base / r:.1f}", speedup(base, r, NODE - 1), "-"])
    heads = ["model", "reward", "s a particle without it", "ms a picture", "share of the run"]
    heads += ["GPUs one server feeds", "must be faster by (7 + 1)", "cores a GPU for 5 %"]
    return table(heads, rows)


def speedup(base: float, r: float, others: int) -> str:
    """How many times faster than a GPU a reward server must be, to be worth a GPU of its own.

    A run takes g seconds without the reward, and r for the reward. G GPUs that wait for one more
    GPU, which is b times as fast, make G/(g + r/b) runs a second; G + 1 GPUs that score by
    themselves make (G + 1)/(g + r). The first is more only for b > r / (G (g + r)/(G + 1) - g),
    and for no b if r/g < 1/G.
    """
    room = others * (base + r) / (others + 1) - base
    return f"{r / room:.1f}" if room > 0 else "never"


def measured_ocr() -> str:
    """Core-seconds that RapidOCR takes for a picture on this machine."""
    found, reader = [], load("ocr")
    for side in (512, 1024):
        images, asked = pictures(side, 0)
        reader(images[:2], asked[:2])
        start = time.process_time()
        reader(images[:16], asked[:16])
        found.append([side, f"{(time.process_time() - start) / 16:.2f}"])
    return table(["side", "core-seconds a picture"], found)


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scores", type=int, default=4)
    parser.add_argument("--reward", choices=REWARDS, default="clip-l", help="of the table cost")
    parser.add_argument("--ocr", action="store_true", help="measure OCR on this CPU instead")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    args = parser.parse_args(argv)
    if args.ocr:
        print(measured_ocr())
        return
    k, run = args.particles, (args.steps, args.scores)
    tables: dict[str, Callable[[], str]] = {
        "assumed": partial(table, ["what", "value", "from"], ASSUMED),
        "operations": operations,
        "cost": partial(cost, args.reward),
        "exchange": partial(exchanged, *run),
        "prompts": partial(prompts, k, *run),
        "populations": partial(populations, *run),
        "rewards": partial(placing, k, *run),
    }
    for name in args.tables:
        print(f"{name}\n\n{tables[name]()}\n", flush=True)
