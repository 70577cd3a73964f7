"""How a process ends whose threads may be in the middle of an inference."""

from __future__ import annotations

import os
import sys
import threading


def leave(status: int) -> None:
    """Exit now, even where a thread is stuck in native code that would not let Python end."""
    stuck = [
        thread.name
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and thread.is_alive()
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    if stuck:
        os._exit(status)
    sys.exit(status)
