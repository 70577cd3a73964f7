"""A folder of COCO annotation files, in any of its usual layouts, to labelled images."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from model_export.data.formats.coco import TABLES, CocoFile, read_coco
from model_export.data.labels import LabelledImage, Reading
from model_export.data.problems import Kind, Problem
from model_export.data.splits import files, leaks, split_by_hash, split_called
from service.errors import DataError

LOOKED_FOR: Final = (
    "COCO: annotations/instances_train.json, train/_annotations.coco.json, "
    "or a .json with images, annotations and categories beside the images"
)

_UNSPLIT: Final = "a .json for each split"
_OTHER_TASKS: Final = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
"""What COCO itself lays beside its instances."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The annotation files of a folder."""

    root: Path
    by_split: Mapping[str, Path]
    whole: Path | None
    """One file for all, which nobody split; then `by_split` is empty."""

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.by_split) or ("train", "val")


def evidence(root: Path) -> str | None:
    """What in a folder speaks for this format; None if nothing does."""
    found = [path.relative_to(root).as_posix() for path in _candidates(root)]
    if not found:
        return None
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def split_names(root: Path) -> tuple[str, ...]:
    """The splits that there are. Raises DataError."""
    return _lay_out(root).splits


def read(root: Path, split: str, *, naming: bool) -> Reading:
    """Read one split; `naming`: also count the classes. Raises DataError.

    Where one file holds everything, the images are split by a hash of their file names' stems.
    """
    layout = _lay_out(root)
    if layout.whole is not None:
        content = counted = read_coco(layout.whole)
        images, problems = _hashed(root, content, split)
    else:
        content = read_coco(_file_of(layout, split))
        train = _train(layout, content)
        images, problems = _listed(root, content, train)
        if naming and train is None:
            raise DataError(f"{root}: no annotations of the train split, which name the classes")
        counted = train or content
    problems = [*content.problems, *problems]
    if not naming:
        return Reading(tuple(images), problems=tuple(problems))
    if counted is not content:
        problems += [each for each in counted.problems if each.fatal]
    return Reading(tuple(images), counted.names, (*problems, *_unused(counted)))


def _hashed(root: Path, content: CocoFile, split: str) -> tuple[list[LabelledImage], list[Problem]]:
    """The images of a split that nobody chose."""
    if not content.images:
        return [], _no_images(content)
    stems = (each.relative.stem for each in content.images)
    return _find_images(root, content, split_by_hash(root, stems, split, unsplit=_UNSPLIT))


def _listed(
    root: Path, content: CocoFile, train: CocoFile | None
) -> tuple[list[LabelledImage], list[Problem]]:
    """All images of a file; those that train has too are among the problems."""
    images, problems = _find_images(root, content, None)
    problems += _no_images(content)
    if train is not None and train is not content:
        others, _ = _find_images(root, train, None)
        places = {each.image: (each.annotation, each.size_line) for each in images}
        problems += leaks(places, [each.image for each in others])
    return images, problems


def _train(layout: _Layout, content: CocoFile) -> CocoFile | None:
    path = layout.by_split.get("train")
    if path is None:
        return None
    return content if path == content.path else read_coco(path)


def _no_images(content: CocoFile) -> list[Problem]:
    if content.images or any(problem.fatal for problem in content.problems):
        return []
    what = "no image in 'images'; list the images there"
    return [Problem(content.path, None, what, fatal=True)]


def _unused(content: CocoFile) -> Iterator[Problem]:
    if content.unused:
        what = f"categories without an object are not used: {', '.join(content.unused[:20])}"
        yield Problem(content.path, None, what, fatal=False, kind=Kind.UNUSED_CLASS)


def _file_of(layout: _Layout, split: str) -> Path:
    path = layout.by_split.get(split_called(split) or split)
    if path is None:
        raise DataError(
            f"{layout.root}: no annotations of the split {split!r}; there are "
            f"{', '.join(layout.by_split)}; add them, or put everything into one file, of which a "
            "fifth is then held out"
        )
    return path


# --- layouts -------------------------------------------------------------------------------------


def _lay_out(root: Path) -> _Layout:
    candidates = _candidates(root)
    if not candidates:
        raise DataError(f"{root}: no annotations here; expected {LOOKED_FOR}")
    by_split: dict[str, Path] = {}
    rest: list[Path] = []
    for path in candidates:
        folder = "" if path.parent in (root, root / "annotations") else path.parent.name
        split = split_called(path.stem) or split_called(folder)
        if split is None:
            rest.append(path)
        elif split in by_split:
            raise DataError(
                f"{root}: two files for the split {split!r}, {by_split[split]} and {path}; take "
                "one away"
            )
        else:
            by_split[split] = path
    if by_split:
        return _Layout(root, dict(sorted(by_split.items())), None)
    if len(rest) > 1:
        listed = ", ".join(str(path.relative_to(root)) for path in rest[:8])
        raise DataError(
            f"{root}: several annotation files, none named after a split: {listed}; name them "
            "train.json and val.json, or leave one"
        )
    return _Layout(root, {}, rest[0])


def _candidates(root: Path) -> list[Path]:
    """The .json files that hold annotations: in annotations/, in a split's folder, at the top."""
    folder = root / "annotations"
    if folder.is_dir():
        inside = [path for path in files(folder, {".json"}) if path.is_file()]
        instances = [path for path in inside if path.name.startswith("instances")]
        kept = instances or [p for p in inside if not p.name.startswith(_OTHER_TASKS)]
        if kept:
            return kept
    in_splits = [
        path
        for each in sorted(root.iterdir())
        if each.is_dir() and split_called(each.name)
        for path in files(each, {".json"})
        if _is_coco(path)
    ]
    return in_splits or [path for path in files(root, {".json"}) if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    """By name, or by two of the words that such a file has: it need not be whole."""
    if path.name.lower().endswith(".coco.json") or split_called(path.stem):
        return True
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return sum(text.find(f'"{name}"'.encode()) >= 0 for name in TABLES) >= 2
    except (OSError, ValueError):
        # Unreadable or empty.
        return False


# --- images ------------------------------------------------------------------------------------


def _find_images(
    root: Path, content: CocoFile, members: frozenset[str] | None
) -> tuple[list[LabelledImage], list[Problem]]:
    """The images that are there, of the stems in `members` or all, and the missing ones."""
    bases = [base for base in _bases(root, content.path) if base.is_dir()]
    images: list[LabelledImage] = []
    problems: list[Problem] = []
    for image in content.images:
        name = image.relative
        if members is not None and name.stem not in members:
            continue
        path = _find_image(name, bases)
        if path is None:
            looked = ", ".join(f"{base.relative_to(root)}/" for base in bases)
            what = f"no image {image.file_name[:80]!r}, looked in {looked}; add it"
            problems.append(Problem(content.path, image.line, what, fatal=True))
            continue
        images.append(
            LabelledImage(
                image=path,
                annotation=content.path,
                objects=tuple(image.objects),
                size=image.size,
                size_line=image.line,
                size_fields="width and height",
            )
        )
    return images, problems


def _bases(root: Path, annotations: Path) -> list[Path]:
    """Where images may lie, the likeliest first."""
    stem = annotations.stem.removeprefix("instances_")
    split = split_called(stem)
    names = [stem, *([split] if split else []), *(["valid"] if split == "val" else [])]
    bases = [] if annotations.parent.name == "annotations" else [annotations.parent]
    for name in dict.fromkeys(names):
        bases += [root / name, root / "images" / name, root / name / "images"]
    bases += [root / "images", root / "data", root, annotations.parent / "images"]
    return list(dict.fromkeys(bases))


def _find_image(name: PurePosixPath, bases: list[Path]) -> Path | None:
    # A path of the machine that labelled says nothing here but its last part.
    inside = not name.is_absolute() and ".." not in name.parts
    last = PurePosixPath(name.name)
    for each in dict.fromkeys([name, last] if inside else [last]):
        for base in bases:
            path = base / each
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):
                # Too long, or with a null byte.
                return None
    return None
