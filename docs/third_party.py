"""Writes the table of docs/third-party.md from the wheels that the container images install.

`make notices` downloads the wheels of both lock files, by their hashes, and calls this.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "third-party.md"
VARIANTS: Final = ("cpu", "gpu")
BEGIN: Final = "<!-- made by `make notices`, do not edit -->\n"
END: Final = "<!-- end of what is made -->\n"

JUDGED: Final[Mapping[str, str]] = {
    "0BSD": "permissive",
    "Apache-2.0": "permissive",
    "BSD-2-Clause": "permissive",
    "BSD-3-Clause": "permissive",
    "CC0-1.0": "permissive",
    "LicenseRef-NVIDIA-Proprietary": "NVIDIA",
    "MIT": "permissive",
    "MIT-CMU": "permissive",
    "MPL-2.0": "MPL",
    "PSF-2.0": "permissive",
    "Zlib": "permissive",
}
"""Licences that somebody has looked at, with the paragraph of the page on what they ask for."""

_OLD_NAMES: Final[Mapping[str, str]] = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "MIT License": "MIT",
}
"""What distributions without an SPDX expression write."""

_READ: Final[Mapping[str, str]] = {"cykooz-resizer": "MIT OR Apache-2.0"}
"""Of distributions that state theirs by classifiers and texts alone, as these were read."""

_TEXT: Final = re.compile(
    r"(^|/)(licen[cs]e|copying|notice|thirdpartynotices)[^/]*$", re.IGNORECASE
)


def locked(variant: str) -> dict[str, str]:
    """Versions by canonical name, as a lock file pins them."""
    text = (ROOT / f"requirements-{variant}.lock").read_text()
    pins = re.findall(r"^([A-Za-z0-9][\w.-]*==[^\s;\\]+)", text, flags=re.MULTILINE)
    found = [Requirement(pin) for pin in pins]
    return {canonicalize_name(each.name): str(each.specifier)[2:] for each in found}


def licence(metadata: Message) -> str:
    """SPDX expression of a distribution. Raises ValueError for a licence not yet reviewed."""
    stated = metadata["License-Expression"] or (metadata["License"] or "").strip()
    stated = stated or _READ.get(canonicalize_name(metadata["Name"]), "")
    expression = _OLD_NAMES.get(stated, stated)
    unknown = [name for name in names(expression) if name not in JUDGED]
    if not expression or unknown:
        raise ValueError(
            f"{metadata['Name']} {metadata['Version']}: licence {stated[:80]!r}; look at it, "
            "then add it to JUDGED in docs/third_party.py and to the page"
        )
    return str(expression)


def names(expression: str) -> list[str]:
    """The licences of an expression.

    >>> names("MPL-2.0 AND (Apache-2.0 OR MIT)")
    ['MPL-2.0', 'Apache-2.0', 'MIT']
    """
    words = re.findall(r"[\w.-]+", expression)
    return [word for word in words if word not in ("AND", "OR", "WITH")]


def table(wheels: Iterable[Path]) -> str:
    """The rows of all that is locked. Raises ValueError, also for a wheel that is missing."""
    by_pin = {}
    for path in wheels:
        name, version, _, _ = parse_wheel_filename(path.name)
        by_pin[name, str(version)] = path
    locks = {variant: locked(variant) for variant in VARIANTS}
    rows = ["| distribution | version | licence | images | its texts |", "|---|---|---|---|---|"]
    for name, version in sorted({pin for lock in locks.values() for pin in lock.items()}):
        if (name, version) not in by_pin:
            raise ValueError(f"{name} {version}: no wheel of it was downloaded")
        metadata, texts = _read(by_pin[name, version])
        images = " ".join(v for v in VARIANTS if locks[v].get(name) == version)
        rows.append(f"| {name} | {version} | {licence(metadata)} | {images} | {texts or 'none'} |")
    return "\n".join(rows) + "\n"


def _read(wheel: Path) -> tuple[Message, int]:
    """A wheel's metadata, and how many licence texts and notices are in it."""
    with zipfile.ZipFile(wheel) as file:
        inside = file.namelist()
        (metadata,) = (each for each in inside if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
        texts = [each for each in inside if _TEXT.search(each) and not each.endswith(".py")]
        return message_from_bytes(file.read(metadata)), len(texts)


def main(folder: Path) -> None:
    """Put the table of the wheels in `folder` into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    rows = table(folder.glob("*.whl"))
    PAGE.write_text(f"{before}{BEGIN}\n{rows}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"third_party.py: {error}")
