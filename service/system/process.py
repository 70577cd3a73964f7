"""Stop signals, standard files, and exit while threads are at work."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Final

STOP_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK")
    if hasattr(signal, name)
)
"""Signals by which a terminal or a service manager ends a process."""


def stop_signals() -> list[signal.Signals]:
    """Return the stop signals to handle: all but those that `nohup` or a shell had ignored."""
    always = (signal.SIGINT, signal.SIGTERM)
    return [
        each
        for each in STOP_SIGNALS
        if each in always or signal.getsignal(each) is not signal.SIG_IGN
    ]


def open_standard_files() -> None:
    """Open the null device in place of each of stdin, stdout and stderr that is closed.

    The next file or connection would get the number, and with it what libraries write to stderr.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def leave(status: int) -> None:
    """Exit now, even if a thread in native code would keep Python from ending."""
    # Ends the thread that writes the log, unless stderr is not read.
    logging.shutdown()
    stuck = [
        thread.name
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and thread.is_alive()
    ]
    if stuck:
        os._exit(status)
    sys.exit(status)
