"""Training in several processes: their ranks, collectives and launch.

torchrun sets every process's rank by environment variables. A run that it did not start has one
process, for which the functions here do nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from service.errors import RetinaserveError


class ProcessLost(RetinaserveError):
    """Another process of the run ended before this one was done."""

    title = "Process lost"


@dataclass(frozen=True, slots=True)
class World:
    """Rank of this process and number of processes."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines, each with as many processes."""
        return self.size // self.local_size


def world() -> World:
    """Return this process's place from torchrun's environment variables."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return World(*(int(os.environ[name]) for name in names))


T = TypeVar("T")


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of items that all processes work through together."""
    place = world()
    return items[place.rank :: place.size]


# --- collectives ------------------------------------------------------------------------


def processes() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any] | None:
    """Return every process's value, by rank, on the first process; None on the others."""
    if processes() == 1:
        return [value]
    gathered: list[Any] | None = [None] * processes() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def broadcast(value: Any) -> Any:
    """Return the first process's value, on every process."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# --- start and end -------------------------------------------------------------------------------


def launch(count: int, command: Sequence[str]) -> None:
    """Run a command as `count` processes of one run on this machine, until all have ended.

    The first one that fails ends the others. Raises SystemExit with its exit status, or
    ProcessLost if a signal ended it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failed process has printed its reason; torch's report of it is a page long.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, command[0])(*command[1:])
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = _culprit(codes)
        if codes[rank] > 0:
            raise SystemExit(codes[rank]) from error
        name = signal.Signals(-codes[rank]).name
        raise ProcessLost(f"process {rank} of {count} was ended by {name}") from error


def _culprit(codes: Mapping[int, int]) -> int:
    """Return the process that ended the run, by exit codes as `subprocess` gives them.

    Others are then ended by SIGTERM, or fail because they miss the one that a signal ended.

    >>> _culprit({0: 1, 1: -9}), _culprit({0: -15, 1: 2})
    (1, 1)
    """
    return min(codes, key=lambda rank: (codes[rank] == -signal.SIGTERM, codes[rank] > 0, rank))


def this_command() -> list[str]:
    """Return the command line of this process."""
    return [sys.executable, *sys.argv]


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Raise ProcessLost in place of torch's errors of broken connections."""
    try:
        yield
    except RuntimeError as error:
        if processes() == 1 or not _is_broken_connection(error):
            raise
        raise ProcessLost(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, "
            "whose own message says why"
        ) from error


def _is_broken_connection(error: RuntimeError) -> bool:
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "remote process has terminated",
    )
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
