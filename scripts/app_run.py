"""What the app runs, without its page: a form -> a wish -> events, one run at a time."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
import tempfile
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

import rewards
from rewards.spec import Call, Term, format_terms
from rewards.spec import parse as parse_spec
from steering import FeynmanKac, loading, tiny
from steering.lineage import Moment
from steering.observer import needs_scores
from steering.prompts import Prompt
from steering.settings import scored_steps
from steering.weights import normalize

__all__ = [
    "Desk", "Done", "Ended", "Loading", "Picture", "Stopped", "Studio", "Waiting", "Wish",
    "default_reward", "parse", "spec_of",
]  # fmt: skip

logger = logging.getLogger(__name__)

MOST_STEPS = 1000  # what the schedulers were trained with
TICK = 0.5  # s, how often a silent run lets its page look whether someone still listens
KEPT = 20  # folders of finished runs
EMBEDDED_REWARDS = ("aesthetic", "clip", "dino")  # those that have a tiny form


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One run, checked as far as that goes without loading anything."""

    prompt: str
    model: str
    lora: str | None
    reward: str
    particles: int
    seed: int
    call: dict[str, Any]  # keywords of the pipeline's call
    settings: FeynmanKac


@dataclass(frozen=True)
class Waiting:
    """So many runs come first."""

    ahead: int


@dataclass(frozen=True)
class Loading:
    """What goes on before the first step or after the last one."""

    what: str


@dataclass(frozen=True)
class Picture:
    """One returned image: its file, its reward, and its weight among its siblings, in [0, 1]."""

    particle: int
    file: Path
    reward: float
    weight: float


@dataclass(frozen=True)
class Done:
    """A finished run, the picture of highest reward first."""

    pictures: tuple[Picture, ...]
    log_z: float
    report: Path | None


@dataclass(frozen=True)
class Ended:
    """A run that gave nothing: why, in one sentence."""

    sentence: str
    stopped: bool = False  # by its user


Event = Waiting | Loading | Moment | Done | Ended


class Stopped(Exception):
    """Raised inside a run whose user has asked for its end."""


def default_reward(model: str) -> str:
    return spec_of({"clip": 1.0}, model)


def spec_of(weights: Mapping[str, float], model: str) -> str:
    """The spec of some built-in rewards and their weights, tiny ones for an embedded model."""
    terms = []
    for name, weight in weights.items():
        small = model in tiny.NAMES and name in EMBEDDED_REWARDS
        terms.append(Term(Call(name, ("tiny",) if small else ()), _number("weight", weight)))
    return format_terms(tuple(terms))


def parse(form: Mapping[str, Any], most: int, trusted: str | None = None) -> Wish:
    """The wish of a form's raw values; ValueError for what cannot be, in one sentence.

    most: particles. trusted: the one spec that may import code, that of the command line; pages
    are open to whoever reaches them.
    """
    prompt = Prompt(_text(form, "prompt")).text
    if not prompt:
        raise ValueError("the prompt is empty: write what to draw")
    model = _text(form, "model")
    if not model:
        raise ValueError(f"the model is empty: try {tiny.NAMES[0]}, or name a folder or a hub id")
    loading.check_name(model)
    reward = _text(form, "reward") or default_reward(model)
    if reward != trusted:
        _refuse_imports(parse_spec(reward))
    particles = _whole("particles", form["particles"], 1, most)
    call = tiny.call_defaults(model) if model in tiny.NAMES else {}
    if steps := _text(form, "steps"):
        call["num_inference_steps"] = _whole("steps", _read(steps), 1, MOST_STEPS)
    if guidance := _text(form, "guidance"):
        call["guidance_scale"] = _number("guidance", _read(guidance))
    settings = FeynmanKac(
        reward_scale=_number("λ", form["reward_scale"]),
        potential=_text(form, "potential"),
        min_ess=_number("the least ESS", form["min_ess"]),
        num_scores=_whole("the number of scores", form["num_scores"], 1, MOST_STEPS),
    )
    if "num_inference_steps" in call and needs_scores(settings, particles):
        scored_steps(call["num_inference_steps"], settings)
    return Wish(
        prompt=prompt,
        model=model,
        lora=_text(form, "lora") or None,
        reward=reward,
        particles=particles,
        seed=_whole("seed", form["seed"], 0, 2**53),
        call=call,
        settings=settings,
    )


def _refuse_imports(terms: Sequence[Term]) -> None:
    for term in terms:
        if ":" in term.call.name:
            raise ValueError(
                f"the reward {term.call.name} would import code, which the page does not do: "
                "start the app with --reward to use it"
            )
        for inner in term.call.sums:
            _refuse_imports(inner)


def _text(form: Mapping[str, Any], name: str) -> str:
    value = form.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{name} is {value!r:.80}: write text")
    return (value or "").strip()


def _read(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # to be refused as it is


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{name} is {_shown(value)}: give a finite number")


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, int | float) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{name} is {_shown(value)}: give a whole number from {low} to {high}")


def _shown(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "empty" if value is None else f"{value!r:.80}"


class Studio:
    """Draws wishes, one at a time; keeps the last model and the last reward.

    root: where each run gets a folder of its own; all but the last KEPT are deleted.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, root: Path) -> None:
        self._device, self._dtype, self._root = device, dtype, root
        self._model: tuple[tuple[str, str | None], Any, Any] | None = None
        self._reward: tuple[str, Any] | None = None
        self._folders: deque[Path] = deque()

    def draw(self, wish: Wish, emit: Callable[[Event], None]) -> None:
        """One run, told to `emit`, which ends it by raising; ValueError for what is refused."""
        from steering import steer

        emit(Loading(f"Loading the reward {wish.reward}"))
        reward = self._rewarded(wish.reward)
        reward.check([wish.prompt])
        emit(Loading(f"Loading the model {wish.model}"))
        pipe, preview = self._loaded(wish.model, wish.lora)
        emit(Loading("Encoding the prompt"))
        out = steer(
            pipe, wish.prompt, reward, wish.particles, wish.settings, wish.seed,
            preview=preview, progress=False, watch=emit, **wish.call,
        )  # fmt: skip
        emit(Loading("Saving"))
        folder = out.save(self._new_folder())
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = [folder / name for name in manifest["results"]["files"][0]]
        scores, weights = out.rewards[0].tolist(), normalize(out.log_weights)[0].tolist()
        pictures = list(map(Picture, range(len(files)), files, scores, weights))
        pictures.sort(key=lambda picture: -picture.reward)
        emit(Done(tuple(pictures), out.log_z[0].item(), _report(folder)))

    def _rewarded(self, spec: str) -> Any:
        if self._reward is None or self._reward[0] != spec:
            self._reward = None
            self._reward = spec, rewards.load(spec, self._device)
        return self._reward[1]

    def _loaded(self, name: str, lora: str | None) -> tuple[Any, Any]:
        if self._model is None or self._model[0] != (name, lora):
            self._model = None  # two may not fit in memory
            gc.collect()
            pipe = loading.load_pipeline(name, self._dtype, lora).to(self._device)
            preview = loading.load_preview("auto", name, self._dtype, pipe)
            preview = None if preview is None else preview.to(self._device)
            loading.set_attention(pipe, "auto")
            loading.tune(pipe, preview=preview)
            pipe.set_progress_bar_config(disable=True)
            self._model = (name, lora), pipe, preview
        return self._model[1:]

    def _new_folder(self) -> Path:
        while len(self._folders) >= KEPT:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        self._folders.append(Path(tempfile.mkdtemp(dir=self._root)))
        return self._folders[-1]


def _report(folder: Path) -> Path | None:
    if find_spec("steering.page") is None:
        return None
    from steering import page  # pyright: ignore[reportAttributeAccessIssue]

    return page.write(folder)


@dataclass(eq=False)
class _Job:
    session: str
    wish: Wish
    events: SimpleQueue[Event | None] = field(default_factory=SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    at: str = "before its first step"

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def emit(self, event: Event) -> None:
        self.check()
        if isinstance(event, Moment):
            self.at = f"at step {event.step + 1} of {event.num_steps}"
        self.events.put(event)


class Desk:
    """Takes wishes from many sessions and has them drawn one at a time, in the order of asking."""

    def __init__(self, draw: Callable[[Wish, Callable[[Event], None]], None]) -> None:
        self._draw = draw
        self._line: deque[_Job] = deque()
        self._turn = threading.Condition()

    def run(self, session: str, wish: Wish) -> Iterator[Event | None]:
        """The events of one run, Done or Ended last; None where nothing happened for a moment.

        Closing the iterator stops the run: no one looks any more.
        """
        job = _Job(session, wish)
        with self._turn:
            self._line.append(job)
        threading.Thread(target=self._work, args=(job,), daemon=True).start()
        try:
            while True:
                try:
                    event = job.events.get(timeout=TICK)
                except Empty:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._end(job)

    def stop(self, session: str) -> None:
        """End the runs of this session, at their next step, or before they begin."""
        with self._turn:
            jobs = [job for job in self._line if job.session == session]
        for job in jobs:
            self._end(job)

    def _end(self, job: _Job) -> None:
        job.stop.set()
        with self._turn:
            self._turn.notify_all()

    def _work(self, job: _Job) -> None:
        try:
            self._await_turn(job)
            self._draw(job.wish, job.emit)
        except Stopped:
            logger.info("A run was stopped %s.", job.at)
            job.events.put(Ended(f"Stopped {job.at}.", stopped=True))
        except ValueError as error:
            job.events.put(Ended(" ".join(str(error).split())))
        except Exception as error:  # whatever it was, the app stays up for the next one
            logger.exception("A run broke.")
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
            job.events.put(Ended(f"the run broke ({reason}); the app is still there"))
        finally:
            with self._turn:
                self._line.remove(job)
                self._turn.notify_all()
            job.events.put(None)

    def _await_turn(self, job: _Job) -> None:
        told = 0
        with self._turn:
            while (ahead := self._line.index(job)) > 0:
                if ahead != told:
                    job.emit(Waiting(ahead))
                    told = ahead
                self._turn.wait()
                job.check()
