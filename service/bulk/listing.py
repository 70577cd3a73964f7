"""The images of a run, listed once into one Parquet file, a row group for each part.

So every part knows its images whatever happens to the input meanwhile, and no process ever has
more than one part's names in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from service.bulk.files import files_of, full_name, join, parent
from service.bulk.walk import walk
from service.errors import DataError
from service.filenames import written
from service.imaging.decode import SUFFIXES

SCHEMA: Final = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("group", pa.int32()),
        pa.field("row", pa.int32()),
    ]
)
_NAMES_AT_A_TIME: Final = 10_000


class Item(NamedTuple):
    """One image of the listing."""

    path: str
    """How the output names it: as `written`."""
    file: str
    """Full name of the image, or of the Parquet file that holds it."""
    group: int | None = None
    """Row group of that Parquet file; None: the file is the image."""
    row: int | None = None
    """Row in that group."""


class Lister:
    """Lists the images of the inputs."""

    def __init__(
        self, inputs: Sequence[str], *, column: str | None = None, name_column: str | None = None
    ) -> None:
        """`column` of Parquet files has paths or bytes; None: the only column that could.

        `name_column` has what the output calls an image.
        """
        self.column = column
        """Known at the latest once a Parquet file was met."""
        self._inputs = inputs
        self._name_column = name_column
        self._tables = column is not None

    def items(self) -> Iterator[Item]:
        """Yield every image, in an order that depends on the input alone. Raises DataError."""
        for given in self._inputs:
            nothing = True
            for name in walk(given, self._wanted):
                nothing = False
                if self._tables or _suffix(name) == ".parquet":
                    yield from self._rows(name)
                else:
                    yield Item(written(name), name)
            if nothing:
                raise DataError(f"{given}: {self._nothing()}")

    def _wanted(self, name: str) -> bool:
        """Return whether a file of a folder is listed."""
        suffix = _suffix(name)
        return suffix == ".parquet" if self._tables else suffix in SUFFIXES

    def _nothing(self) -> str:
        if self._tables:
            return "no Parquet file there"
        kinds = ", ".join(sorted(SUFFIXES))
        return f"no image there ({kinds}; for a folder of Parquet files give --column)"

    def _rows(self, name: str) -> Iterator[Item]:
        try:
            with files_of(name).open(name) as file, pq.ParquetFile(file) as table:
                yield from self._rows_of(name, table)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{name}: not a readable Parquet file: {error}") from error

    def _rows_of(self, name: str, table: pq.ParquetFile) -> Iterator[Item]:
        schema = table.schema_arrow
        if self.column is None:
            self.column = _only_column(name, schema)
        kind = _type_of(name, schema, self.column)
        if not (holds_bytes(kind) or _holds_text(kind)):
            raise DataError(f"{name}: column {self.column!r} has {kind}, not paths or bytes")
        if self._name_column is not None:
            _type_of(name, schema, self._name_column)
        folder, before = parent(name), 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            named: Iterable[Any] = [None] * count
            if self._name_column is not None:
                named = _values(table, group, self._name_column)
            values: Iterable[Any] = [None] * count
            if not holds_bytes(kind):
                values = _values(table, group, self.column)
            for row, (called, value) in enumerate(zip(named, values, strict=True)):
                if value is None:
                    # The row has the image, or nothing, which is told when it is read.
                    path = f"{written(name)}#{before + row}" if called is None else str(called)
                    yield Item(path, name, group, row)
                else:
                    file = join(folder, value)
                    yield Item(written(file) if called is None else str(called), file)
            before += count


class Listing:
    """A written listing."""

    def __init__(self, name: str) -> None:
        """Raises DataError."""
        try:
            self._file = files_of(name).open(name)
            self._table = pq.ParquetFile(self._file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{name}: not a readable listing: {error}") from error

    @property
    def count(self) -> int:
        """The number of images."""
        return int(self._table.metadata.num_rows)

    @property
    def parts(self) -> int:
        """The number of parts."""
        return int(self._table.num_row_groups)

    def part(self, number: int) -> list[Item]:
        """Return the images of a part."""
        columns = self._table.read_row_group(number, use_threads=False).to_pydict()
        columns["file"] = [
            full_name(file) if file.startswith("file://") else file for file in columns["file"]
        ]
        return [Item(*values) for values in zip(*columns.values(), strict=True)]

    def items(self) -> Iterator[Item]:
        """Yield every image."""
        for number in range(self.parts):
            yield from self.part(number)

    def close(self) -> None:
        """Close the file."""
        self._table.close()
        self._file.close()


def write_listing(name: str, items: Iterator[Item], part_size: int) -> int:
    """Write a listing, whole or not at all. Return its number of images."""
    count = 0
    with (
        files_of(name).write(name) as file,
        pq.ParquetWriter(
            file,
            SCHEMA,
            compression="zstd",
            use_dictionary=["file"],
            column_encoding={"path": "DELTA_BYTE_ARRAY"},
        ) as writer,
    ):
        while chunk := list(islice(items, part_size)):
            paths, names, *places = (list(column) for column in zip(*chunk, strict=True))
            columns = [paths, list(map(written, names)), *places]
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=part_size)
            count += len(chunk)
    return count


def difference(then: Listing, now: Iterable[Item]) -> str | None:
    """Return in words how the images differ from a listing; None if they do not."""
    found: list[str] = []
    before = after = 0
    for old, new in zip_longest(then.items(), now):
        before += old is not None
        after += new is not None
        if old != new and not found:
            was = "nothing" if old is None else old.path
            found.append(f"image {max(before, after)} was {was}, now it is ")
            found.append("nothing" if new is None else new.path)
    return f"{before} images then, {after} now; {''.join(found)}" if found else None


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a Parquet column of this type holds images, not their paths.

    Structs with a field `bytes` are how some data sets keep images.
    """
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _type_of(name: str, schema: pa.Schema, column: str) -> pa.DataType:
    if column not in schema.names:
        raise DataError(f"{name}: no column {column!r}; there is {', '.join(schema.names)}")
    return schema.field(column).type


def _only_column(name: str, schema: pa.Schema) -> str:
    fitting = [f.name for f in schema if holds_bytes(f.type) or _holds_text(f.type)]
    if len(fitting) != 1:
        raise DataError(
            f"{name}: which column has the images, as paths or as bytes? Give --column; "
            f"there is {', '.join(schema.names)}"
        )
    return str(fitting[0])


def _values(table: pq.ParquetFile, group: int, column: str) -> Iterator[Any]:
    for batch in table.iter_batches(
        _NAMES_AT_A_TIME, row_groups=[group], columns=[column], use_threads=False
    ):
        yield from batch.column(0).to_pylist()


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
