"""`retinaserve`, its threads named for the kernel as they are in Python: `serving.py` starts this.

So that CPU time can be told apart by thread; up to version 3.13 Python keeps the names to itself.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

PR_SET_NAME = 15


def name_threads() -> None:
    """From now on every thread that Python starts tells its name to the kernel (15 characters).

    onnxruntime's threads are called as the one that made the session.
    """
    plain: Callable[[threading.Thread], None] = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        ctypes.CDLL(None).prctl(PR_SET_NAME, thread.name.encode(), 0, 0, 0)
        plain(thread)

    threading.Thread.run = run  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    # This folder, whose files are no business of the service.
    del sys.path[0]
    if sys.platform == "linux":
        name_threads()
    from service.cli import main

    main()
