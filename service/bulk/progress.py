"""Progress of a run: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Final

from tqdm import tqdm

_LINE_SECONDS: Final = 30.0


class Progress:
    """Images, images a second, failed ones and the time left. Not thread-safe."""

    def __init__(self, total: int, *, done: int, failed: int) -> None:
        """`done` of the images were finished before, `failed` of them with an error."""
        self._total = total
        self._done = self._before = done
        self._failed = failed
        self._started = self._told = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="image",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            smoothing=0.05,
        )
        self._show()

    def start(self) -> None:
        """Start the clock; what came before, such as loading the model, does not count."""
        self._started = self._told = time.monotonic()

    def add(self, images: int = 1, failed: int = 0) -> None:
        """Count finished images."""
        self._done += images
        if failed:
            self._failed += failed
            self._show()
        self._bar.update(images)
        if self._bar.disable and time.monotonic() >= self._told + _LINE_SECONDS:
            self._told = time.monotonic()
            print(f"retinaserve: {self.line()}", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Images a second since the start."""
        return (self._done - self._before) / max(1e-9, time.monotonic() - self._started)

    def line(self) -> str:
        """Return the progress as one line."""
        left = "?"
        if self.rate:
            left = tqdm.format_interval((self._total - self._done) / self.rate)
        return (
            f"{self._done} of {self._total} images, {self.rate:.1f}/s, {self._failed} failed, "
            f"{left} left"
        )

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()

    def _show(self) -> None:
        self._bar.set_postfix(failed=self._failed, refresh=False)
