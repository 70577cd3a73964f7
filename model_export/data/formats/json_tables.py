"""JSON objects of long arrays, with the line on which each element of an array begins.

One pass with the standard library's scanner: it parses one element at a time, and the line breaks
between elements are counted on the way.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_DECODER: Final = json.JSONDecoder()


class JsonError(ValueError):
    """The text is no such JSON from `line` on."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Located:
    """A value and the line on which it begins."""

    value: Any
    line: int


def parse_tables(content: bytes) -> dict[str, Located]:
    r"""The members of a JSON object; those that are arrays hold a list of Located elements.

    Raises JsonError.

    >>> tables = parse_tables(b'{"a": [1,\n 2],\n "b": 3}')
    >>> [(item.value, item.line) for item in tables["a"].value], tables["b"].line
    ([(1, 1), (2, 2)], 3)
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JsonError(line, "not UTF-8 text") from error
    walker = _Walker(text)
    try:
        return walker.tables()
    except json.JSONDecodeError as error:
        raise JsonError(error.lineno, f"{error.msg}, column {error.colno}") from error
    except RecursionError as error:
        raise JsonError(walker.line, "nested too deeply") from error
    except ValueError as error:
        # An integer of thousands of digits.
        raise JsonError(walker.line, "a number is too long") from error


class _Walker:
    """Goes through the text once; `line` is the line of the element that was begun last."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._counted = 0
        self.line = 1

    def tables(self) -> dict[str, Located]:
        if self._peek() != "{":
            kind = "an array" if self._peek() == "[" else "no JSON object"
            raise json.JSONDecodeError(f"{kind}, where an object is needed", self._text, self._at)
        members: dict[str, Located] = {}
        if self._begins("{", "}"):
            while True:
                if self._peek() != '"':
                    raise json.JSONDecodeError("a name is missing", self._text, self._at)
                name = self._value()
                self._expect(":")
                self._peek()
                line = self._mark()
                value = self._array() if self._peek() == "[" else self._value()
                members[name] = Located(value, line)
                if not self._continues("}"):
                    break
        if self._peek():
            raise json.JSONDecodeError("more text after the end", self._text, self._at)
        return members

    def _array(self) -> list[Located]:
        elements: list[Located] = []
        if self._begins("[", "]"):
            while True:
                self._peek()
                line = self._mark()
                elements.append(Located(self._value(), line))
                if not self._continues("]"):
                    break
        return elements

    def _value(self) -> Any:
        value, self._at = _DECODER.raw_decode(self._text, self._at)
        return value

    def _peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None, "it matches nothing as well"
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def _begins(self, opening: str, closing: str) -> bool:
        """Go past the opening character; False, and past the closing one, if nothing is inside."""
        self._expect(opening)
        if self._peek() != closing:
            return True
        self._at += 1
        return False

    def _continues(self, closing: str) -> bool:
        """Go past a comma, which is followed by more, or past the closing character."""
        if self._peek() == closing:
            self._at += 1
            return False
        self._expect(",")
        return True

    def _expect(self, character: str) -> None:
        found = self._peek()
        if found != character:
            what = f"expected {character!r}" if found else f"the text ends before {character!r}"
            raise json.JSONDecodeError(what, self._text, self._at)
        self._at += 1

    def _mark(self) -> int:
        self.line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self.line
