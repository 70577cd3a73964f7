"""The output: a Parquet file per part, a row per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from service.bulk.files import files_of, join
from service.engine.postprocessing import rounded
from service.imaging.canvas import Size
from service.runtime.detector import Detections

SCHEMA: Final = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("class_ids", pa.list_(pa.int32())),
        pa.field("error", pa.string()),
    ]
)
"""Everything but path and error is null where there is an error."""
RUN_KEY: Final = b"retinaserve"
"""Key of the schema's metadata: the run, as JSON."""
PART_KEY: Final = b"retinaserve.part"
"""Key of the schema's metadata: the part's `Counts` and the id of its run, as JSON."""


class Found(NamedTuple):
    """An image's size and detections."""

    image: Size
    detections: Detections


class Row(NamedTuple):
    """The row of an image."""

    path: str
    found: Found | None
    error: str | None
    """The error as "slug: detail"; None if there is none."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a part, or of a run."""

    images: int = 0
    detections: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Failed images by the slug of the error."""

    @property
    def failed(self) -> int:
        """The number of failed images."""
        return self.errors.total()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.images + other.images,
            self.detections + other.detections,
            self.errors + other.errors,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        return {
            "pictures": self.images,
            "failed": self.failed,
            "errors": dict(sorted(self.errors.items())),
            "detections": self.detections,
        }


def part_name(folder: str, number: int) -> str:
    """Return the full name of a part's file."""
    return join(folder, f"part-{number:07d}.parquet")


def write_part(
    name: str, rows: Sequence[Row], *, classes: Sequence[str], run: dict[str, Any], run_id: str
) -> Counts:
    """Write a part, whole or not at all. Raises OSError."""
    counts = count(rows)
    about = {"run": run_id, **counts.to_json()}
    table = to_table(rows, classes).replace_schema_metadata(
        {RUN_KEY: orjson.dumps(run), PART_KEY: orjson.dumps(about)}
    )
    with files_of(name).write(name) as file:
        pq.write_table(table, file, compression="zstd")
    return counts


def read_counts(name: str, run_id: str) -> Counts | None:
    """Return the counts of a finished part; None if the file is not a whole part of this run."""
    try:
        with files_of(name).open(name) as file:
            metadata = pq.read_schema(file).metadata or {}
        about = orjson.loads(metadata[PART_KEY])
        if about["run"] == run_id:
            return counts_of(about)
    except (OSError, pa.ArrowException, KeyError, orjson.JSONDecodeError):
        # Cut off by a power failure, say: it is done again.
        pass
    return None


def counts_of(document: dict[str, Any]) -> Counts:
    """Return the Counts of what `Counts.to_json` returned."""
    return Counts(document["pictures"], document["detections"], Counter(document["errors"]))


def read_rows(name: str) -> list[Row]:
    """Return the rows of a finished part."""
    with files_of(name).open(name) as file:
        table = pq.read_table(file)
    return [_from_parquet(row) for row in table.to_pylist()]


def count(rows: Sequence[Row]) -> Counts:
    """Return the counts of rows."""
    return Counts(
        len(rows),
        sum(len(row.found.detections) for row in rows if row.found is not None),
        Counter(row.error.partition(":")[0] for row in rows if row.error is not None),
    )


def to_table(rows: Sequence[Row], classes: Sequence[str]) -> pa.Table:
    """Return rows as a table of `SCHEMA`; numbers are rounded as in responses."""
    found = [row.found for row in rows]
    there = [each.detections for each in found if each is not None]
    detections = Detections(
        np.concatenate([np.empty((0, 4), np.float32), *(each.boxes for each in there)]),
        np.concatenate([np.empty(0, np.float32), *(each.scores for each in there)]),
        np.concatenate([np.empty(0, np.int64), *(each.labels for each in there)]),
    )
    boxes, scores = rounded(detections)
    class_ids = pa.array(detections.labels.astype(np.int32))
    lengths = [0 if each is None else len(each.detections) for each in found]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
    missing = pa.array([each is None for each in found])

    def listed(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values, mask=missing)

    columns = [
        pa.array([row.path for row in rows], pa.string()),
        pa.array([None if each is None else each.image.width for each in found], pa.int32()),
        pa.array([None if each is None else each.image.height for each in found], pa.int32()),
        listed(pa.FixedSizeListArray.from_arrays(_float32(boxes.reshape(-1)), 4)),
        listed(_float32(scores)),
        listed(pa.array(list(classes), pa.string()).take(class_ids)),
        listed(class_ids),
        pa.array([row.error for row in rows], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _float32(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values.astype(np.float32))


def _from_parquet(row: dict[str, Any]) -> Row:
    if row["error"] is not None:
        return Row(row["path"], None, row["error"])
    detections = Detections(
        np.array(row["boxes"], np.float32).reshape(-1, 4),
        np.array(row["scores"], np.float32),
        np.array(row["class_ids"], np.int64),
    )
    return Row(row["path"], Found(Size(row["height"], row["width"]), detections), None)
