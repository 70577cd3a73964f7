r"""Whether images chosen by `data pick` teach more than images chosen by chance.

    python benchmarks/pick.py --data /data/fod-a-mini --data /data/bccd --output runs/pick
    python benchmarks/pick.py --data /data/bccd --output runs/quick --seeds 1 --epochs 1 \
        --start --config light --weights mobilenet_v2.pth

For each data set (Pascal VOC with train and val lists) and seed: train on a quarter of the train
images, add a tenth of them by `data pick` and by chance, train each on from the first checkpoint
with the same settings, and measure all three on val. Each result is a line of rows.csv; what is
there is not measured again, and a run that was cut short continues. Needs the training side.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

COLUMNS: Final = ("data", "seed", "way", "images", "AP", "AP50")
WAYS: Final = ("pick", "chance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--first", type=float, default=0.25, help="share labelled at first")
    parser.add_argument("--added", type=float, default=0.10, help="share added by each way")
    parser.add_argument(
        "--start",
        nargs=argparse.REMAINDER,
        default=["--config", "light", "--weights", "imagenet"],
        help="options of the first training; all that follows",
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for data in options.data:
        for seed in range(options.seeds):
            measure(data.resolve(), seed, options)
    summarise(options.output / "rows.csv")


def measure(data: Path, seed: int, options: argparse.Namespace) -> None:
    """Measure one data set with one seed."""
    rows, place = options.output / "rows.csv", options.output / data.name / str(seed)
    place = place.resolve()
    rng = random.Random(seed)
    train = rng.sample(names := listed(data, "train"), len(names))
    first = train[: round(options.first * len(train))]
    rest, count = train[len(first) :], round(options.added * len(train))
    epochs = ["--epochs", str(options.epochs), "--seed", str(seed)]
    base = place / "first"
    evaluated(rows, (data.name, seed, "first"), data, base, first, [*options.start, *epochs])
    for way in WAYS:
        if way == "chance":
            added = rng.sample(rest, count)
        else:
            added = picked(data, place, base / "model.onnx", first, rest, count)
        start = ["--init", str(base / "run" / "best.ckpt")]
        key = (data.name, seed, way)
        evaluated(rows, key, data, place / way, [*first, *added], [*start, *epochs])


def listed(data: Path, split: str) -> list[str]:
    """The names of a split."""
    return (data / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def picked(
    data: Path, place: Path, model: Path, first: Sequence[str], rest: Sequence[str], count: int
) -> list[str]:
    """Choose by `data pick`."""
    table = place / "picked" / "why.html"
    if not table.exists():
        for name, members in (("labelled", first), ("pool", rest)):
            link(data, members, place / name)
        command("data", "pick", place / "pool", "--labelled", place / "labelled", "--link",
                "--model", model, "--count", count, "--output", place / "picked")  # fmt: skip
    with (place / "picked" / "why.csv").open(newline="", encoding="utf-8") as file:
        return [Path(row["file"]).stem for row in csv.DictReader(file)]


def evaluated(
    rows: Path,
    key: tuple[str, int, str],
    data: Path,
    place: Path,
    train: Sequence[str],
    options: Sequence[str],
) -> None:
    """Train on some of the images, measure on val and write the row, unless it is there."""
    if key in done(rows):
        return
    labelled, run, model = place / "data", place / "run", place / "model.onnx"
    val = listed(data, "val")
    link(data, [*train, *val], labelled / "JPEGImages")
    link(data, [*train, *val], labelled / "Annotations", source="Annotations")
    lists = labelled / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for split, members in (("train", train), ("val", val)):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in sorted(members)))
    resume = ["--resume"] if (run / "last.ckpt").exists() else []
    command("train", "--data", labelled, "--output", run, *options, *resume)
    command("export", run / "best.ckpt", "--data", labelled, "--output", model)
    command("evaluate", model, "--data", labelled, "--json", place / "val.json")
    measured = json.loads((place / "val.json").read_text())["metrics"]
    is_new = not rows.exists()
    with rows.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow([*key, len(train), measured["ap"], measured["ap50"]])


def link(data: Path, names: Collection[str], folder: Path, source: str = "JPEGImages") -> None:
    """Make a folder of links to some of the images, or annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = frozenset(names)
    for path in (data / source).iterdir():
        target = folder / path.name
        if path.stem in wanted and not target.is_symlink():
            target.symlink_to(path)


def command(*words: object) -> None:
    """Run a command of retinaserve. Ends the benchmark if it fails."""
    print("$ retinaserve", *words, flush=True)
    subprocess.run([sys.executable, "-m", "service.cli", *map(str, words)], check=True)


def done(rows: Path) -> set[tuple[str, int, str]]:
    """The rows that are there."""
    return {(row["data"], int(row["seed"]), row["way"]) for row in read(rows)}


def read(rows: Path) -> list[dict[str, str]]:
    if not rows.exists():
        return []
    with rows.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise(rows: Path) -> None:
    """Print each seed's AP, and how far `pick` is above chance."""
    found = {(row["data"], row["seed"], row["way"]): float(row["AP"]) for row in read(rows)}
    print("\n| data | seed | first | chance | pick | pick - chance |\n|---|---|---|---|---|---|")
    for data, seed in dict.fromkeys(key[:2] for key in found):
        first, chance, pick = (found[data, seed, way] for way in ("first", "chance", "pick"))
        cells = f"{first:.4f} | {chance:.4f} | {pick:.4f} | {pick - chance:+.4f}"
        print(f"| {data} | {seed} | {cells} |")


if __name__ == "__main__":
    main()
