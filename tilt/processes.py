"""The processes of a run that `accelerate launch` started, and their communication.

They communicate over gloo, which takes no GPU memory and notices the death of a process at once.
Computations of all processes, such as a training step, use the default group (NCCL on GPUs), which
waits as long. Without a launcher there is one process, and all of this does nothing.
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

__all__ = ["PATIENCE", "Processes", "Stopped", "is_main", "join"]

T = TypeVar("T")

# Variables that accelerate, torchrun and three MPIs set for the processes that they start. A
# cluster may set WORLD_SIZE for every job, so it is not among them.
_STARTED = (
    "ACCELERATE_USE_CPU",
    "LOCAL_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
# One process may have hours of work left when another has finished, or a slow reward in a step; the
# default timeouts, 10 minutes with NCCL and 30 with gloo, would end the run. A launcher ends the
# other processes when one has died, long before.
PATIENCE = timedelta(days=7)
_NOTICED = 5.0  # seconds within which a launcher, which polls ten times a second, notices a death


class Stopped(KeyboardInterrupt):
    """Another process of the run has ended, or the launcher was asked to terminate."""


def is_main() -> bool:
    """Return whether this is the main process, without initialising any communication."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    index: 0 is the main process. device: this process's device, None without a launcher.
    group: the gloo process group.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process does the work that only one process should do."""
        return self.index == 0

    def agree(self, work: Callable[[], T]) -> T:
        """Return this process's work() if it raises no ValueError on any process.

        Otherwise the main process raises the first error, and the others exit with status 2.
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
        _ignore_the_launcher()  # the first process that exits must not interrupt the main one
        if self.is_main:
            raise ValueError(refusals[0])
        raise SystemExit(2)

    def told(self, work: Callable[[], T]) -> T:
        """Return the main process's work() on every process; errors are handled as in `agree`."""
        result = self.agree(lambda: work() if self.is_main else None)
        return self._gathered(result)[0]

    def finish(self) -> None:
        """Wait for all processes and end the communication; raises Stopped if one has died."""
        if self.count > 1:
            try:
                # wait_for_everyone() would not handle signals while it waits
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
        """A context for a computation of all processes; Stopped is raised if one has died.

        The RuntimeError of a failed collective cannot be distinguished from others. So this waits
        until the launcher, if it notices a death, terminates the other processes.
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
    """Initialise the communication with other processes if a launcher started this one.

    device: as the user named it. Raises ValueError if the device does not support several
    processes.
    """
    if not any(name in os.environ for name in _STARTED):
        return Processes()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from finetune.sharding import whole_others

    whole_others()
    none = torch.accelerator.current_accelerator(check_available=True) is None
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or device == "cpu" or none
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes < int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"device {state.device} does not support communication of "
            f"{os.environ['WORLD_SIZE']} processes: pass --device cpu, or start one process"
        )
    device_here = state.device or torch.device("cpu")
    if state.num_processes == 1:
        return Processes(device=device_here)
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    signal.signal(signal.SIGTERM, lambda *_: _stop())
    return Processes(state.process_index, state.num_processes, device_here, group)


def _stop(why: BaseException | None = None) -> NoReturn:
    """Raise Stopped, because the launcher asked for it or a collective has failed."""
    _ignore_the_launcher()
    raise Stopped from why


def _ignore_the_launcher() -> None:
    """Ignore SIGTERM, since this process will end by itself after its last messages."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
