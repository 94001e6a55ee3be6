"""A training step compared with the calls of its network alone.

    python -m scripts.bench training --model sd15 sdxl sd35m --method gdro grpo --device cuda

The bare step makes the same calls of the same network on inputs of the same shapes, and nothing
else: for gdro a forward without the adapter, one with it, and the backward of a mean square; for
grpo the forwards that sample, then a forward and a backward for each step of the window. With grpo,
the share of the decoder in a step is given too, as the bare network has none. sd15, sdxl and sd35m
are networks of that size with random weights, in bfloat16 with gradient checkpointing.

--call prints how long a prediction takes with a network that returns at once: that is what the
pipeline's own call costs around its network, whatever the device.
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune import gdro, grpo, lora
from finetune.chains import schedule_of
from finetune.conditioning import Conditioning
from finetune.data import Data
from finetune.decoding import decoder_of
from finetune.groups import Group
from finetune.network import Model
from finetune.online import Task
from finetune.recording import record
from steering import tiny
from steering.networks import StandIn
from tilt import loading

from ..parser import parser_of
from ..tables import head, line
from .machine import about
from .networks import MODELS
from .sized import sized
from .timing import seconds

CPU = torch.device("cpu")
PROMPTS = [f"a {colour} star" for colour in ("red", "blue", "green", "orange", "yellow", "purple")]
METHODS = ("gdro", "grpo")
RATIO = "step / bare, median [quartiles]"
FIGURES = ("images a second", "bare network", "its speed, kept", RATIO, "decoder's part")
HEAD = head("model", "method", *FIGURES)


@dataclass(frozen=True)
class Subject:
    """The pipeline that is trained and the conditioning of PROMPTS."""

    pipe: Any
    model: Model
    given: Conditioning

    @property
    def network(self) -> Any:
        return getattr(self.pipe, self.model.part)


class _Asked(BaseException):
    """Ends a prediction where it calls the network, with the arguments of that call."""


def subject_of(model: str, device: torch.device, **call: Any) -> Subject:
    """An embedded pipeline in float32, or one of published size in bfloat16, which has no encoders.

    call: more keywords of the pipeline's call.
    """
    if model in tiny.NAMES:
        pipe, own = tiny.load(model).to(device), tiny.call_defaults(model)
        return Subject(pipe, Model(pipe), record(pipe, PROMPTS, **own | call))
    pipe, own, _ = sized(model, device, torch.bfloat16)
    embeds, pooled = own.pop("prompt_embeds"), own.pop("pooled_prompt_embeds", None)

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        prompt = kwargs["prompt"] if "prompt" in kwargs else args[0]
        rows = len(prompt) if isinstance(prompt, list) else 1
        found = (embeds, embeds) if pooled is None else (embeds, embeds, pooled, pooled)
        return tuple(x.repeat(rows, *[1] * (x.ndim - 1)) for x in found)

    vars(pipe)["encode_prompt"] = encode_prompt
    own = {name: value for name, value in own.items() if "embeds" not in name}
    return Subject(pipe, Model(pipe), record(pipe, PROMPTS, **own | call))


def gdro_of(model: str, settings: gdro.Gdro, device: torch.device = CPU) -> gdro.GdroTrainer:
    """A trainer on random latents and rewards for PROMPTS."""
    subject, m = subject_of(model, device), 2 * settings.k
    draws = torch.Generator().manual_seed(0)
    groups = [
        Group(i, torch.arange(m) + m * i, torch.rand(m, generator=draws))
        for i in range(len(PROMPTS))
    ]
    latents = torch.randn(len(PROMPTS) * m, *subject.given.form.shape, generator=draws)
    data = Data(latents, subject.given.to("cpu"), groups, 0)
    accelerator = accelerator_on(device)
    return gdro.GdroTrainer(subject.network, subject.model, data, settings, accelerator)


def accelerator_on(device: torch.device) -> Accelerator:
    """One process on the CPU, or on the first GPU."""
    return Accelerator(cpu=device.type == "cpu")


class TimedDecoder:
    """A pipeline's decoder that adds up its seconds."""

    def __init__(self, subject: Subject) -> None:
        self.decode = decoder_of(subject.model, subject.pipe, subject.given)
        self.seconds = 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        made: list[Tensor] = []
        self.seconds += seconds(lambda: made.append(self.decode(latents)))
        return made[0]


def redness(images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """A reward that costs nothing."""
    return images[:, 0].mean((1, 2)), {}


def grpo_of(
    model: str, settings: grpo.Grpo, device: torch.device = CPU
) -> tuple[grpo.GrpoTrainer, TimedDecoder]:
    """A trainer with a reward that costs nothing, and its decoder."""
    subject = subject_of(model, device, num_inference_steps=settings.num_inference_steps)
    schedule, decoder = schedule_of(subject.model, subject.given), TimedDecoder(subject)
    task = Task(schedule, PROMPTS, subject.given, decoder, redness)
    accelerator = accelerator_on(device)
    trainer = grpo.GrpoTrainer(subject.network, subject.model, task, settings, accelerator)
    return trainer, decoder


def asked(learner: Any, given: Conditioning, x: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """The bare call of the network in a prediction, with its arguments made beforehand."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Asked(args, kwargs)

    try:
        learner.model.predict(StandIn(learner.bare, stop), given, x, t)
    except _Asked as end:
        args, kwargs = end.args
        return lambda: learner.bare(*args, **kwargs)[0]
    raise ValueError("a prediction does not call its network")


def bare_gdro(trainer: gdro.GdroTrainer) -> Callable[[], None]:
    """The network calls of a step, on inputs made beforehand."""
    learner, calls = trainer.learner, []
    for inputs in (part.to(learner.accelerator.device) for part in trainer.inputs(0)):
        k = inputs.rewards.shape[1]
        times, noise = inputs.t.repeat_interleave(k), inputs.noise.expand_as(inputs.x0)
        x, _ = trainer.noising.noised(inputs.x0.flatten(0, 1), noise.flatten(0, 1), times)
        calls.append(asked(learner, inputs.given.repeated(k), x, times))

    def step() -> None:
        for call in calls:
            with torch.no_grad(), lora.reference(learner.bare):
                call()
            call().square().mean().backward()
        _forget(learner)

    return step


def bare_grpo(trainer: grpo.GrpoTrainer) -> Callable[[], None]:
    """The network calls of an epoch without guidance and with one update."""
    s, samples, learner = trainer.settings, trainer.samples, trainer.learner
    shape, window, device = samples.schedule.shape, s.window(0), learner.accelerator.device

    def call_of(groups: int, rows: int) -> Callable[[], Tensor]:
        given = samples.task.given[range(groups)].repeated(rows).to(device)
        x, t = torch.randn(groups * rows, *shape), torch.tensor(0.5)
        return asked(learner, given, x.to(device), t.to(device))

    one, group = call_of(1, 1), call_of(1, s.k)
    parts = [call_of(len(share), s.k) for share in samples.shares(0)]

    def step() -> None:
        with torch.no_grad():
            for _ in range(s.groups):  # which share their start up to the window, if at all
                for number in range(len(samples.schedule)):
                    (one if s.share_start and number < window.start else group)()
        for part in parts:
            for _ in window:
                part().square().mean().backward()
        _forget(learner)

    return step


def _forget(learner: Any) -> None:
    for parameter in learner.weights.values():
        parameter.grad = None


def trainer_of(
    model: str, method: str, device: torch.device = CPU
) -> tuple[Any, Callable[[], None], TimedDecoder | None]:
    """A trainer of the method, its bare step, and its decoder if it has one."""
    embedded = model in tiny.NAMES
    less: dict[str, Any] = {} if embedded else {"gradient_checkpointing": True, "rank": 32}
    if method == "gdro":
        groups = 4 if embedded else 1
        learns = gdro_of(model, gdro.Gdro(groups=4, micro_groups=groups, **less), device)
        return learns, bare_gdro(learns), None
    groups = 2 if embedded else 1
    settings = grpo.Grpo(groups=groups, k=8, micro_groups=groups, **less)
    samples, decoder = grpo_of(model, settings, device)
    return samples, bare_grpo(samples), decoder


def measure(model: str, method: str, pairs: int, device: torch.device = CPU) -> dict[str, Any]:
    """Steps and bare steps in turn, after one of each to warm up.

    ratios holds step over bare for each pair. images_per_second and bare_images_per_second are
    medians; fraction is the first over the second, decoder the share of the decoder in a step.
    """
    if method not in METHODS:
        raise ValueError(f"the method is {method!r}; take one of {list(METHODS)}")
    trainer, bare, decoder = trainer_of(model, method, device)
    own, alone, decoding = [], [], []
    for pair in range(pairs + 1):
        before = decoder.seconds if decoder else 0.0
        times = seconds(trainer.train_step), seconds(bare)
        if pair:
            own.append(times[0])
            alone.append(times[1])
            decoding.append((decoder.seconds - before) / times[0] if decoder else 0.0)
    images = trainer.settings.groups * trainer.settings.k
    ratios = [a / b for a, b in zip(own, alone, strict=True)]
    return {
        "model": model,
        "method": method,
        "images_a_step": images,
        "ratios": ratios,
        "images_per_second": images / statistics.median(own),
        "bare_images_per_second": images / statistics.median(alone),
        "fraction": 1 / statistics.median(ratios),
        "decoder": statistics.median(decoding),
    }


def around(model: str, calls: int = 100) -> tuple[float, float]:
    """Milliseconds of a prediction beside its network, for 6 rows: the median, the least."""
    subject, k = subject_of(model, CPU), 6
    x, t = torch.randn(k, *subject.given.form.shape), torch.rand(k)
    given = subject.given[[0]].repeated(k)
    idle = StandIn(subject.network, lambda *args, **kwargs: (x,))
    found = [
        1e3 * seconds(lambda: subject.model.predict(idle, given, x, t)) for _ in range(calls + 1)
    ]
    return statistics.median(found[1:]), min(found[1:])


def row(found: dict[str, Any]) -> str:
    """A measurement as a row of the table below HEAD."""
    low, middle, high = statistics.quantiles(found["ratios"], n=4)
    speeds = (f"{found[name]:.1f}" for name in ("images_per_second", "bare_images_per_second"))
    shares = (f"{found['fraction']:.3f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]")
    return line(found["model"], found["method"], *speeds, *shares, f"{found['decoder']:.3f}")


def main(argv: list[str] | None = None) -> None:
    """Print the table line by line."""
    parser = parser_of(__doc__, __name__)
    models = (*tiny.NAMES, *MODELS)
    parser.add_argument("--model", nargs="+", default=["tiny-sd3"], choices=models)
    parser.add_argument("--method", nargs="+", default=["gdro"], choices=METHODS)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--call", action="store_true", help="only what surrounds the network")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs is {args.pairs} but must be 2 or more")
    if args.call:
        print(head("model", "ms around the network, median", "least"))
        for model in args.model:
            print(line(model, *(f"{ms:.2f}" for ms in around(model))), flush=True)
        return
    device = loading.pick_device(args.device)
    dtypes = {torch.float32 if model in tiny.NAMES else torch.bfloat16 for model in args.model}
    print("; ".join(about(device, dtype) for dtype in sorted(dtypes, key=str)), end="")
    print(f", {args.pairs} pairs\n\n{HEAD}")
    for case in itertools.product(args.model, args.method):
        print(row(measure(*case, args.pairs, device)), flush=True)
