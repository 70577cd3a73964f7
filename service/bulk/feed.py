"""The images of the parts to do, one by one, read ahead in a thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from service.bulk.parts import Row, part_name, read_rows
from service.bulk.reading import ImageReader, Numbered, Source
from service.bulk.run import Run


class Part:
    """A part and the rows that are finished."""

    def __init__(self, number: int, paths: list[str], rows: list[Row | None]) -> None:
        """`rows` are None where an image is still to be detected."""
        self.number = number
        self.paths = paths
        self.rows = rows
        self.missing = sum(row is None for row in rows)


class Feed:
    """Hands images to the tasks of one event loop."""

    def __init__(
        self, run: Run, parts: Iterable[int], *, again: bool, most: int, pool: ThreadPoolExecutor
    ) -> None:
        """With `again` the parts are finished, and their failed images are what is to be done.

        An image has `most` bytes at most. `pool` has one thread, so that files are read in order.
        """
        self._run = run
        self._again = again
        self._reader = ImageReader(run.manifest.column, most)
        self._jobs = self._all(parts)
        self._pool = pool
        self._ahead: deque[tuple[Part, Source]] = deque()
        self._turn = asyncio.Lock()
        """Held by the task that reads ahead for all."""
        self._over = False

    async def next(self) -> tuple[Part, Source] | None:
        """Return the next image and its part; None at the end. Raises what reading raises."""
        while not self._ahead:
            async with self._turn:
                if self._over:
                    return None
                if not self._ahead:
                    loop = asyncio.get_running_loop()
                    some = await loop.run_in_executor(self._pool, next, self._jobs, None)
                    self._over = some is None
                    self._ahead.extend(some or ())
        return self._ahead.popleft()

    def _all(self, parts: Iterable[int]) -> Iterator[list[tuple[Part, Source]]]:
        """Yield a few images at a time, in the pool's thread."""
        with closing(self._reader):
            for number in parts:
                yield from self._part(number)

    def _part(self, number: int) -> Iterator[list[tuple[Part, Source]]]:
        items = self._run.listing.part(number)
        rows: list[Row | None] = [None] * len(items)
        if self._again:
            old = read_rows(part_name(self._run.output, number))
            rows = [row if row.error is None else None for row in old]
        part = Part(number, [item.path for item in items], rows)
        todo = [Numbered(i, items[i]) for i, row in enumerate(rows) if row is None]
        for sources in self._reader.sources(todo):
            yield [(part, source) for source in sources]
