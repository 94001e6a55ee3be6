"""The runs of the app, without its page: a Wish becomes events, one run at a time."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import tempfile
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

import rewards
from steering.lineage import Moment
from steering.weights import normalize
from tilt import loading, report
from tilt.app.inputs import Wish

__all__ = ["Cancelled", "Desk", "Done", "Ended", "Loading", "Picture", "Studio", "Waiting"]

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds after which a run without events lets the page check its client
KEPT = 20  # number of finished runs whose folders are kept


@dataclass(frozen=True)
class Waiting:
    """The run waits; `ahead` runs come first."""

    ahead: int


@dataclass(frozen=True)
class Loading:
    """A message on the work before the first step or after the last one."""

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
    """A finished run, with the image of highest reward first."""

    pictures: tuple[Picture, ...]
    log_z: float
    report: Path


@dataclass(frozen=True)
class Ended:
    """A run that ended without a result, with the reason in one sentence."""

    sentence: str
    stopped: bool = False  # by its user


Event = Waiting | Loading | Moment | Done | Ended


class Cancelled(Exception):
    """Raised inside a run that its user has stopped."""


class Studio:
    """Runs wishes, one at a time; keeps the last model and the last reward in memory.

    root: where each run gets its own folder; all but the last KEPT are deleted.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, root: Path) -> None:
        self._device, self._dtype, self._root = device, dtype, root
        self._model: tuple[tuple[str, str | None], Any, Any] | None = None
        self._reward: tuple[str, Any] | None = None
        self._folders: deque[Path] = deque()

    def draw(self, wish: Wish, emit: Callable[[Event], None]) -> None:
        """Run a wish; `emit` gets its events and may raise to end it. ValueError if invalid."""
        from steering import steer

        emit(Loading(f"Loading the reward {wish.reward}"))
        reward = self._rewarded(wish.reward, wish.own)
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
        emit(Done(tuple(pictures), out.log_z[0].item(), report.write(folder)))

    def _rewarded(self, spec: str, own: bool) -> Any:
        if self._reward is None or self._reward[0] != spec:
            self._reward = None
            self._reward = spec, rewards.load(spec, self._device, imports=own)
        return self._reward[1]

    def _loaded(self, name: str, lora: str | None) -> tuple[Any, Any]:
        if self._model is None or self._model[0] != (name, lora):
            self._model = None  # two models may not fit in memory
            gc.collect()
            pipe = loading.load_pipeline(name, self._dtype, lora).to(self._device)
            preview = loading.load_preview("auto", name, self._dtype, pipe)
            preview = None if preview is None else preview.to(self._device)
            loading.tune(pipe, preview=preview)
            pipe.set_progress_bar_config(disable=True)
            self._model = (name, lora), pipe, preview
        return self._model[1:]

    def _new_folder(self) -> Path:
        while len(self._folders) >= KEPT:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        self._folders.append(Path(tempfile.mkdtemp(dir=self._root)))
        return self._folders[-1]


@dataclass(eq=False)
class _Job:
    session: str
    wish: Wish
    events: SimpleQueue[Event | None] = field(default_factory=SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    at: str = "before its first step"

    def check(self) -> None:
        if self.stop.is_set():
            raise Cancelled

    def emit(self, event: Event) -> None:
        self.check()
        if isinstance(event, Moment):
            self.at = f"at step {event.step + 1} of {event.num_steps}"
        self.events.put(event)


class Desk:
    """A queue of wishes from many sessions, which are run one at a time, in order."""

    def __init__(self, draw: Callable[[Wish, Callable[[Event], None]], None]) -> None:
        self._draw = draw
        self._line: deque[_Job] = deque()
        self._turn = threading.Condition()

    def run(self, session: str, wish: Wish) -> Generator[Event | None, None, None]:
        """Yield the events of one run, Done or Ended last; None if there was none for TICK seconds.

        Closing the iterator stops the run, because nobody reads its events any more.
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
        """Stop the runs of this session, at their next step or before they begin."""
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
        except Cancelled:
            logger.info("A run was stopped %s.", job.at)
            job.events.put(Ended(f"Stopped {job.at}.", stopped=True))
        except ValueError as error:
            job.events.put(Ended(" ".join(str(error).split())))
        except Exception as error:  # the app must stay available after any error
            logger.exception("A run failed.")
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
            job.events.put(Ended(f"the run failed ({reason}); the app is still available"))
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
