"""The processes of a run that `accelerate launch` started: which this is, and what all agree on.

What they tell one another goes over gloo, so it takes no memory of a GPU, and a process that died
is noticed at once. Without a launcher there is one process, and none of this does anything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed

__all__ = ["Processes", "Stopped", "is_main", "join"]

T = TypeVar("T")

# What accelerate, torchrun and three MPIs tell the processes that they start. WORLD_SIZE alone is
# no sign: a cluster may set it for all that runs there.
_STARTED = (
    "ACCELERATE_USE_CPU",
    "LOCAL_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
# One process may have hours of work left when another has none; 30 minutes, the default, would end
# the run.
_PATIENCE = timedelta(days=7)
_NOTICED = 5.0  # seconds after which a launcher, which looks ten times a second, has seen a death


class Stopped(KeyboardInterrupt):
    """Another process of the run has ended, or the launcher was told to end."""


def is_main() -> bool:
    """Whether this process speaks for all, known before they have met."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    index: 0 is the main process. device: this process's own, None without a launcher.
    group: what they talk over.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process does what is to be done once."""
        return self.index == 0

    def agree(self, work: Callable[[], T]) -> T:
        """This process's work(), where it raises no ValueError on any.

        Else the main process raises the first one, and the others end with status 2 and no word.
        """
        if self.count == 1:
            return work()
        result: Any = None
        refusal = None
        try:
            result = work()
        except ValueError as error:
            refusal = str(error)
        refusals = [said for said in self._gathered(refusal) if said is not None]
        if not refusals:
            return result
        _ignore_the_launcher()  # all end now, and who is first must not cut off who speaks
        if self.is_main:
            raise ValueError(refusals[0])
        raise SystemExit(2)

    def told(self, work: Callable[[], T]) -> T:
        """What work() gives the main process, or its refusal as in `agree`, on every process."""
        result = self.agree(lambda: work() if self.is_main else None)
        return self._gathered(result)[0]

    def finish(self) -> None:
        """Wait until all are here, and part. Raises Stopped where one has died."""
        if self.count > 1:
            try:
                # Not wait_for_everyone(), which hears no signal while it waits.
                barrier: Any = distributed.barrier(self.group, async_op=True)
                while not barrier.is_completed():
                    time.sleep(0.1)
                barrier.wait()
            except RuntimeError as error:
                _stop(error)
        if distributed.is_initialized():
            distributed.destroy_process_group()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around a computation that all take part in. Raises Stopped where one has died.

        The RuntimeError of a collective that broke is no different from others, so the launcher
        decides: it ends the rest when it has noticed a death.
        """
        try:
            yield
        except RuntimeError:
            if self.count > 1:
                time.sleep(_NOTICED)
            raise

    def _gathered(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(values, value, self.group)
        except RuntimeError as error:
            _stop(error)
        return values


def join(device: str) -> Processes:
    """Meet the others where a launcher started this process.

    device: as the user named it. Raises ValueError for processes that have no way to talk.
    """
    if not any(name in os.environ for name in _STARTED):
        return Processes()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    none = torch.accelerator.current_accelerator(check_available=True) is None
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or device == "cpu" or none
    state = PartialState(cpu=cpu)
    if state.num_processes < int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"device {state.device} has no way for {os.environ['WORLD_SIZE']} processes to work "
            "together: pass --device cpu, or start one process"
        )
    device_here = state.device or torch.device("cpu")
    if state.num_processes == 1:
        return Processes(device=device_here)
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    signal.signal(signal.SIGTERM, lambda *_: _stop())
    return Processes(state.process_index, state.num_processes, device_here, group)


def _stop(why: BaseException | None = None) -> NoReturn:
    """End as the launcher asks, or as a collective that broke foretells that it will."""
    _ignore_the_launcher()
    raise Stopped from why


def _ignore_the_launcher() -> None:
    """It is about to end this process, which ends by itself, after what is still to be said."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
