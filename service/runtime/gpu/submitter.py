"""The thread that runs a session."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Submitter:
    """Runs jobs one after the other in a thread of its own.

    A CUDA graph belongs to the thread that captured it: in another one onnxruntime would capture
    it again.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: a device that hangs must not keep the process from ending.
        threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True).start()

    def run(self, job: Callable[[], T]) -> T:
        """Run a job in that thread and wait for it. Raises what the job raises."""
        future: Future[T] = Future()
        self._jobs.put(partial(_settle, job, future))
        try:
            return future.result()
        finally:
            # An exception's traceback holds this frame, and the future holds the exception.
            del future

    def end(self, last: Callable[[], None]) -> None:
        """Run one more job and end, without waiting for it. Finalizers may call this."""
        self._jobs.put(last)
        self._jobs.put(None)


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        # Otherwise it would hold what it held until the next one comes.
        del job


def _settle(job: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)
