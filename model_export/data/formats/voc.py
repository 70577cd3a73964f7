"""One Pascal VOC annotation file: XML bytes to objects that remember their line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from model_export.data.labels import LabelledObject

EDGES: Final = ("xmin", "ymin", "xmax", "ymax")

_OBJECT: Final = ("annotation", "object")
_SIZE: Final = ("annotation", "size")
_TEXTS: Final = frozenset(
    [
        ("annotation", "filename"),
        (*_SIZE, "width"),
        (*_SIZE, "height"),
        (*_OBJECT, "name"),
        *((*_OBJECT, "bndbox", edge) for edge in EDGES),
    ]
)
"""Full paths, because VOC's body parts nest another <name> and <bndbox> inside <object>."""


class AnnotationError(ValueError):
    """The text at `line` is not a VOC annotation; the message names the remedy."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one file says."""

    filename: str
    """<filename>, or "" without it."""
    size: tuple[float, float] | None
    """(height, width) as written; None where it is absent, zero or no number."""
    size_line: int
    objects: tuple[LabelledObject, ...]


def parse(text: bytes) -> Annotation:
    """Parse an annotation file. Raises AnnotationError."""
    parser = expat.ParserCreate()
    reader = _Reader(parser)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.buffer_text = True
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise AnnotationError(
            error.lineno, f"not well-formed XML ({error}); write the annotation anew"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise AnnotationError(1, f"unknown text encoding ({error}); save it as UTF-8") from error
    return reader.annotation()


@dataclass(slots=True)
class _Field:
    text: str
    line: int


@dataclass(slots=True)
class _Reader:
    """Collects the few texts that matter; memory does not grow with anything else."""

    parser: expat.XMLParserType
    path: list[str] = field(default_factory=list)
    text: list[str] | None = None
    line: int = 1
    top: dict[str, _Field] = field(default_factory=dict)
    current: dict[str, _Field] = field(default_factory=dict)
    objects: list[LabelledObject] = field(default_factory=list)

    def start(self, tag: str, _attributes: Mapping[str, str]) -> None:
        if not self.path and tag != "annotation":
            raise AnnotationError(
                self.parser.CurrentLineNumber,
                f"the root element is <{tag}>, not <annotation>; Pascal VOC XML is needed",
            )
        self.path.append(tag)
        path = tuple(self.path)
        if path in _TEXTS:
            self.text, self.line = [], self.parser.CurrentLineNumber
        elif path == _OBJECT:
            self.current = {"object": _Field("", self.parser.CurrentLineNumber)}
        elif path == (*_OBJECT, "bndbox"):
            self.current["bndbox"] = _Field("", self.parser.CurrentLineNumber)
        elif path == _SIZE:
            self.top["size"] = _Field("", self.parser.CurrentLineNumber)

    def characters(self, text: str) -> None:
        if self.text is not None:
            self.text.append(text)

    def end(self, tag: str) -> None:
        path = tuple(self.path)
        if self.text is not None and path in _TEXTS:
            fields = self.current if path[:2] == _OBJECT else self.top
            fields[tag] = _Field("".join(self.text).strip(), self.line)
            self.text = None
        elif path == _OBJECT:
            self.objects.append(_to_object(self.current))
        self.path.pop()

    def annotation(self) -> Annotation:
        filename = self.top.get("filename")
        size = self.top.get("size")
        return Annotation(
            filename=filename.text if filename else "",
            size=self._size(),
            size_line=size.line if size else 1,
            objects=tuple(self.objects),
        )

    def _size(self) -> tuple[float, float] | None:
        height, width = (
            _number(self.top[tag].text) if tag in self.top else None for tag in ("height", "width")
        )
        # Labelling tools write 0 when they did not open the image.
        if not height or not width or min(height, width) < 0:
            return None
        return height, width


def _to_object(fields: Mapping[str, _Field]) -> LabelledObject:
    line = fields["object"].line
    name = fields.get("name")
    if name is None or not name.text:
        raise AnnotationError(line, "the object has no <name>; write its class there")
    if "bndbox" not in fields:
        raise AnnotationError(
            line, f"the object {name.text!r} has no <bndbox>; boxes are needed, not outlines alone"
        )
    box: list[float] = []
    for edge in EDGES:
        if edge not in fields:
            raise AnnotationError(
                fields["bndbox"].line, f"<bndbox> has no <{edge}>; it needs {', '.join(EDGES)}"
            )
        number = _number(fields[edge].text)
        if number is None:
            raise AnnotationError(
                fields[edge].line,
                f"<{edge}> is {fields[edge].text!r}; it must be a number of pixels",
            )
        box.append(number)
    x1, y1, x2, y2 = box
    return LabelledObject(name.text, (x1, y1, x2, y2), name.line, fields["bndbox"].line)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
