"""Reads the images of a part: each from its file, or row by row from Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, BinaryIO, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from service.bulk.files import check_bytes, files_of, read_image
from service.bulk.listing import Item
from service.errors import RetinaserveError, Unreadable
from service.filenames import written

_FILES_AT_A_TIME: Final = 64
_ROWS_AT_A_TIME: Final = 8
"""Images that are in memory before their turn."""
_BUFFER: Final = 1 << 20
"""Bytes of a Parquet column that are read at a time: a row group may hold gigabytes of images."""


class Numbered(NamedTuple):
    """An image of a part."""

    number: int
    item: Item


class Source(NamedTuple):
    """An image of a part, ready to be read."""

    number: int
    load: Callable[[], bytes | memoryview]
    """For any thread, once. Raises RetinaserveError."""


class ImageReader:
    """Reads parts in order, keeping a Parquet file open from one to the next. Not thread-safe."""

    def __init__(self, column: str | None, most: int) -> None:
        """`column` has the images, `most` is how many bytes one may have."""
        self._column = column
        self._most = most
        self._rows: _Rows | None = None

    def sources(self, images: Sequence[Numbered]) -> Iterator[list[Source]]:
        """Yield images in order, a few at a time."""
        for (file, group), run in groupby(images, _place):
            if group is None:
                yield from self._files(list(run))
            else:
                yield from self._parquet(file, group, list(run))

    def close(self) -> None:
        """Close the Parquet file that is open."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None

    def _files(self, run: Sequence[Numbered]) -> Iterator[list[Source]]:
        for first in range(0, len(run), _FILES_AT_A_TIME):
            yield [
                Source(number, partial(read_image, item.file, self._most))
                for number, item in run[first : first + _FILES_AT_A_TIME]
            ]

    def _parquet(self, file: str, group: int, run: Sequence[Numbered]) -> Iterator[list[Source]]:
        for first in range(0, len(run), _ROWS_AT_A_TIME):
            some = run[first : first + _ROWS_AT_A_TIME]
            try:
                loads = [partial(self._value, self._row(file, group, each.item)) for each in some]
            except Exception as error:
                # A Parquet file may be damaged in any way; its other row groups may be whole.
                self.close()
                reason = f"{written(file)} cannot be read: {error}"
                yield [Source(each.number, partial(_fail, Unreadable(reason))) for each in some]
            else:
                yield [Source(each.number, load) for each, load in zip(some, loads, strict=True)]

    def _row(self, file: str, group: int, item: Item) -> Any:
        assert item.row is not None, "an item of a row group has its row"
        rows = self._rows
        if rows is None or rows.place != (file, group) or rows.next > item.row:
            self.close()
            assert self._column is not None, "found when the Parquet files were listed"
            rows = self._rows = _Rows(file, group, self._column)
        return rows.take(item.row)

    def _value(self, value: Any) -> bytes | memoryview:
        if pa.types.is_struct(value.type):
            value = value["bytes"] if value.is_valid else pa.scalar(None, pa.binary())
        if not (value.is_valid and hasattr(value, "as_buffer")):
            raise Unreadable("the Parquet row holds no image")
        return memoryview(check_bytes(value.as_buffer(), self._most))


class _Rows:
    """A column of a row group, row by row."""

    def __init__(self, file: str, group: int, column: str) -> None:
        self.place = file, group
        self.next = 0
        """The row that comes next."""
        self._file: BinaryIO = files_of(file).open(file)
        # Read as it is needed, and not the whole column at once.
        self._table = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=_BUFFER)
        self._batches = self._table.iter_batches(
            _ROWS_AT_A_TIME, row_groups=[group], columns=[column], use_threads=False
        )
        self._batch: Any = ()
        self._first = 0
        """Row of the batch's first one."""

    def take(self, row: int) -> Any:
        """Return a row at or after the next one."""
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches).column(0)
        self.next = row + 1
        return self._batch[row - self._first]

    def close(self) -> None:
        self._table.close()
        self._file.close()


def _place(image: Numbered) -> tuple[str, int | None]:
    item = image.item
    return ("", None) if item.group is None else (item.file, item.group)


def _fail(error: RetinaserveError) -> bytes:
    raise error
