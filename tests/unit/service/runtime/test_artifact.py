"""What a model file must be before anything runs it, and where a repository holds one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from pydantic import TypeAdapter, ValidationError

from service.cli import retinaserve
from service.commands.offline import find_model
from service.errors import ArtifactError, DataError, UnknownModel
from service.imaging.canvas import MAX_CANVASES, Buckets, ShortSide, Size
from service.runtime.artifact import (
    METADATA_KEY,
    Version,
    VersionText,
    entry_of,
    parse_version,
    read_artifact,
    scan_repository,
    skipped_files,
    write_checksum,
)
from service.runtime.detector import Detector
from service.runtime.devices import Device, open_detector
from service.settings import Settings, bundled_models
from tests import seam_model, tiny_model
from tests.images import LFS_POINTER, encoded, one_red

Spoil = Callable[[Path], None]


def described(**changes: Any) -> Spoil:
    """Other metadata than the network's own."""

    def spoil(path: Path) -> None:
        model = onnx.load(path)
        (entry,) = [each for each in model.metadata_props if each.key == METADATA_KEY]
        metadata = json.loads(entry.value)
        metadata["thresholds"]["per_class"] = {}
        entry.value = json.dumps(metadata | changes)
        onnx.save(model, path)

    return spoil


def holds(content: bytes) -> Spoil:
    """Other content than a model."""

    def spoil(path: Path) -> None:
        path.write_bytes(content)

    return spoil


def pointer(path: Path) -> None:
    """What a checkout without `git lfs pull` holds: the checksum is that of the model."""
    write_checksum(path)
    path.write_bytes(LFS_POINTER)


def answered_by(name: str, *nodes: onnx.NodeProto, element: int | None = None) -> Spoil:
    """One output is computed from what it was, which the nodes find as `before`."""

    def spoil(path: Path) -> None:
        model = onnx.load(path)
        for node in model.graph.node:
            for place, output in enumerate(node.output):
                if output == name:
                    node.output[place] = "before"
        model.graph.node.extend(nodes)
        if element is not None:
            (output,) = [each for each in model.graph.output if each.name == name]
            output.type.tensor_type.elem_type = element
        onnx.save(model, path)

    return spoil


def number(name: str, value: float, element: int) -> onnx.NodeProto:
    tensor = helper.make_tensor(name, element, [], [value])
    return helper.make_node("Constant", [], [name], value=tensor)


def with_fixed_canvas(path: Path) -> None:
    model = onnx.load(path)
    height, width = model.graph.input[0].type.tensor_type.shape.dim[1:3]
    height.dim_value, width.dim_value = 96, 128
    onnx.save(model, path)


def without_an_input(path: Path) -> None:
    model = onnx.load(path)
    (place,) = [i for i, each in enumerate(model.graph.input) if each.name == "max_detections"]
    del model.graph.input[place]
    onnx.save(model, path)


BUCKETS = {"rule": "buckets"}
SHORT_SIDE = {"rule": "short-side", "short": 96, "long": 128}

UNREADABLE: dict[str, tuple[Spoil, str]] = {
    "fewer names": (
        described(classes=["red", "green"]),
        r"the network tells 3 classes apart, but the metadata names 2: \('red', 'green'\)",
    ),
    "more names": (
        described(classes=["red", "green", "blue", "grey"]),
        "tells 3 classes apart, but the metadata names 4",
    ),
    "an output of another type": (
        answered_by(
            "scores",
            helper.make_node("Cast", ["before"], ["scores"], to=TensorProto.DOUBLE),
            element=TensorProto.DOUBLE,
        ),
        "the output 'scores' is DOUBLE with 1 dimensions, expected FLOAT with 1",
    ),
    "no input max_detections": (without_an_input, "the inputs are .*, expected .*max_detections"),
    "a fixed canvas": (with_fixed_canvas, r"\['batch', 96, 128\]; all three must be open"),
    "a canvas too large": (
        described(canvas=BUCKETS | {"sizes": [[96, 128], [100_000, 100_000]]}),
        "canvas 100000x100000 has more than 16777216 pixels, the limit",
    ),
    "a canvas of a thousand digits": (
        described(canvas=BUCKETS | {"sizes": [[32 * 10**999, 32]]}),
        "has more than 16777216 pixels",
    ),
    "too many canvases": (
        described(canvas=BUCKETS | {"sizes": [[32, 32]] * 70_000}),
        f"at most {MAX_CANVASES} items",
    ),
    "a long short side": (
        described(canvas=SHORT_SIDE | {"short": 10**9, "long": 10**9}),
        "less than or equal to 524288",
    ),
    "sides too long together": (
        described(canvas=SHORT_SIDE | {"short": 4096, "long": 4128}),
        "canvas 4096x4128 has more than 16777216 pixels",
    ),
    "a large multiple": (
        described(canvas=SHORT_SIDE | {"multiple": 2**40}),
        "less than or equal to 524288",
    ),
    "a side beyond floats": (described(canvas=SHORT_SIDE | {"long": 10**400}), "524288"),
    "too many classes": (
        described(classes=[f"{i}" for i in range(10_001)]),
        "at most 10000 items",
    ),
    "a long class name": (described(classes=["red", "green", "b" * 257]), "at most 256"),
    "a long name": (described(name="n" * 129), "at most 128"),
    "much metadata": (described(provenance={"log": "x" * (1 << 20)}), "at most 1048576"),
    "a number beyond 64 bits": (
        described(provenance={"seed": 2**70}),
        "cannot be written as JSON: Integer exceeds 64-bit range",
    ),
    "names that repeat": (described(classes=["red", "red", "blue"]), r"repeat: \['red'\]"),
    "a Git LFS pointer": (pointer, "a Git LFS pointer; run `git lfs pull`"),
    "a page": (holds(b"<!DOCTYPE html><title>404</title>"), "not an ONNX file but an HTML page"),
    "an image": (holds(encoded(one_red())), "not an ONNX file but a PNG image"),
}


@pytest.mark.parametrize(("spoil", "why"), UNREADABLE.values(), ids=UNREADABLE)
def test_read_artifact_refuses_a_file_that_cannot_serve(
    tmp_path: Path, spoil: Spoil, why: str
) -> None:
    path = tiny_model.save(tmp_path)
    read_artifact(path)
    spoil(path)
    with pytest.raises(ArtifactError, match=why) as caught:
        read_artifact(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("names", [["red"], ["red", "green"], ["a", "b", "c", "d"]])
def test_read_artifact_counts_classes_before_top_k(tmp_path: Path, names: list[str]) -> None:
    path = seam_model.save(tmp_path)
    described(classes=names)(path)
    with pytest.raises(
        ArtifactError, match=f"3 classes apart, but the metadata names {len(names)}"
    ):
        read_artifact(path)


def test_read_artifact_rejects_one_class_too_few(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(scan_repository(bundled_models())[0].path.read_bytes())
    described(classes=["RBC", "WBC"])(path)
    with pytest.raises(ArtifactError, match="3 classes apart, but the metadata names 2"):
        read_artifact(path)


@pytest.mark.parametrize("command", [("inspect",), ("detect", "--model")])
def test_commands_refuse_a_file_with_fewer_names_than_classes(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tiny_model.save(tmp_path)
    described(classes=["red", "green"])(path)
    (tmp_path / "image.png").write_bytes(encoded(one_red()))
    images = [str(tmp_path)] if "detect" in command else []
    result = CliRunner().invoke(retinaserve, [*command, str(path), *images])
    assert result.exit_code != 0
    assert result.stdout == ""
    assert "3 classes apart" in result.stderr
    assert result.stderr.count("\n") == 1


def test_read_artifact_accepts_canvases_within_bounds(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path)
    sizes = [[4096, 4096], *[[32 * i, 32] for i in range(1, MAX_CANVASES)]]
    described(
        name="my cells",
        classes=["r" * 256, "", "ل"],
        canvas=BUCKETS | {"sizes": sizes},
        provenance={"seed": 2**63, "log": "x" * 1_000_000},
    )(path)
    assert read_artifact(path).metadata.canvas.largest() == Size(4096, 4096)
    described(canvas=SHORT_SIDE | {"short": 800, "long": 1333})(path)
    assert read_artifact(path).metadata.canvas.largest() == Size(800, 1344)


def test_canvas_bounds_apply_to_every_source() -> None:
    for rule in (
        lambda: Buckets(sizes=(Size(102_400, 102_400),)),
        lambda: ShortSide(short=8192, long=8192),
    ):
        with pytest.raises(ValidationError, match="more than 16777216 pixels"):
            rule()


MISTAKEN: dict[str, tuple[Spoil, str]] = {
    "labels beyond the names": (
        answered_by(
            "labels",
            number("seven", 7, TensorProto.INT64),
            helper.make_node("Add", ["before", "seven"], ["labels"]),
        ),
        "labels are 7 to 9, but the metadata names 3 classes: 0 to 2",
    ),
    "boxes without end": (
        answered_by(
            "boxes",
            number("nil", 0, TensorProto.FLOAT),
            helper.make_node("Div", ["before", "nil"], ["boxes"]),
        ),
        "boxes are not all finite",
    ),
    "scores above 1": (
        answered_by(
            "scores",
            number("ten", 10, TensorProto.FLOAT),
            helper.make_node("Mul", ["before", "ten"], ["scores"]),
        ),
        "scores are .* to .*, expected 0 to 1",
    ),
    "one score for all": (
        answered_by(
            "scores",
            helper.make_node("ReduceMax", ["before"], ["scores"], keepdims=1),
        ),
        "are of shapes",
    ),
}


@pytest.mark.parametrize(("spoil", "why"), MISTAKEN.values(), ids=MISTAKEN)
def test_trial_run_rejects_unusable_outputs(tmp_path: Path, spoil: Spoil, why: str) -> None:
    path = tiny_model.save(tmp_path)
    canvas = tiny_model.SIZES[0]
    opened(path).prove(canvas, 2)
    spoil(path)
    with pytest.raises(ArtifactError, match=why):
        opened(path).prove(canvas)


def test_trial_run_checks_the_image_index(tmp_path: Path) -> None:
    path = tiny_model.save(tmp_path)
    answered_by(
        "image_index",
        number("beyond", 2, TensorProto.INT64),
        helper.make_node("Add", ["before", "beyond"], ["image_index"]),
    )(path)
    with pytest.raises(ArtifactError, match="image_index is 2 to 3 in a batch of 2"):
        opened(path).prove(tiny_model.SIZES[0], 2)


def opened(path: Path) -> Detector:
    return open_detector(read_artifact(path), Device("cpu"))


VERSIONS = ("1", "9", "10", "1234567890", "9" * 18)
NO_VERSIONS = ("", "0", "01", "v1", "1.0.0", "-1", "+1", " 1", "1 ", "1\n", "1_0", "1e3")
NO_VERSIONS += ("9" * 19, "9" * 5000, "\u0661", "\uff11", "\u00b2", "latest")


def test_version_has_one_spelling() -> None:
    text, plain = TypeAdapter(VersionText), TypeAdapter(Version)
    for written in VERSIONS:
        assert parse_version(written) == int(written)
        assert text.validate_python(written) == int(written)
        assert plain.validate_python(int(written), strict=True) == int(written)
        assert entry_of(Path("models", "tiny", written, "model.onnx")) is not None
    for written in NO_VERSIONS:
        assert parse_version(written) is None, written
        assert entry_of(Path("models", "tiny", f"{written}", "model.onnx")) is None
        with pytest.raises(ValidationError, match="18 ASCII digits without a leading zero"):
            text.validate_python(written)
    for beyond in (0, -1, 10**18, 2**64, 10**40):
        with pytest.raises(ValidationError):
            plain.validate_python(beyond, strict=True)


def test_commands_use_the_same_version_spelling(tmp_path: Path) -> None:
    settings = Settings(models_dir=tmp_path)
    content = tiny_model.save(tmp_path, version=12).read_bytes()
    assert find_model(settings, "tiny@12").version == 12
    for written in NO_VERSIONS:
        with pytest.raises(DataError, match="18 ASCII digits without a leading zero") as caught:
            find_model(settings, f"tiny@{written}")
        assert len(str(caught.value)) < 300
    with pytest.raises(UnknownModel, match=r"no model 'tiny@1' in .*; there is tiny@12"):
        find_model(settings, "tiny@1")
    for place, version in (
        ("tiny/12/model.onnx", 12),
        ("tiny/012/model.onnx", None),
        ("tiny/\u0661/model.onnx", None),
        ("my model/1/model.onnx", None),
        ("tiny/12/other.onnx", None),
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert find_model(settings, str(path)).version == version


def touch(root: Path, *places: str) -> None:
    for place in places:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


SKIPPED = {
    "model.onnx": "expected <name>/<version>/model.onnx",
    "tiny/model.onnx": "expected <name>/<version>/model.onnx",
    "tiny/1/deeper/model.onnx": "expected <name>/<version>/model.onnx",
    "tiny/3/best.onnx": "expected <name>/<version>/model.onnx",
    "tiny/v1/model.onnx": "'v1' is not a version",
    "tiny/1.0.0/model.onnx": "'1.0.0' is not a version",
    "tiny/01/model.onnx": "'01' is not a version",
    "tiny/\u0661/model.onnx": "18 ASCII digits without a leading zero",
    f"tiny/{10**20}/model.onnx": "at most 18",
    "my model/1/model.onnx": "'my model' is not a model's name: .*128 ASCII letters",
}


def test_scan_lists_models_and_names_skipped_files(tmp_path: Path) -> None:
    touch(tmp_path, "tiny/1/model.onnx", "tiny/1/other.onnx", f"big/{10**17}/model.onnx")
    touch(tmp_path, ".git/1/model.onnx", "tiny/.tmp/model.onnx", "tiny/2/notes.txt")
    assert skipped_files(tmp_path) == {}
    touch(tmp_path, *SKIPPED)
    found = [(entry.name, entry.version) for entry in scan_repository(tmp_path)]
    assert found == [("big", 10**17), ("tiny", 1)]
    skipped = {str(path): reason for path, reason in skipped_files(tmp_path).items()}
    assert skipped.keys() == SKIPPED.keys()


@pytest.mark.parametrize(("place", "why"), SKIPPED.items(), ids=SKIPPED)
def test_empty_repository_error_names_the_skipped_file(
    tmp_path: Path, place: str, why: str
) -> None:
    touch(tmp_path, place)
    with pytest.raises(ArtifactError, match=f"no model; expected .*{why}") as caught:
        scan_repository(tmp_path)
    assert repr(place) in str(caught.value)


def test_empty_repository_error_names_a_few_of_many(tmp_path: Path) -> None:
    touch(tmp_path, *(f"tiny/v{i}/model.onnx" for i in range(50)))
    with pytest.raises(ArtifactError, match=", 42 more") as caught:
        scan_repository(tmp_path)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("name", ["model.onnx", "model.sha256"])
def test_a_pipe_or_a_folder_in_a_files_place_is_refused(tmp_path: Path, name: str) -> None:
    path = tiny_model.save(tmp_path)
    place = path.with_name(name)
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(ArtifactError, match="cannot be read: it is not a regular file"):
        read_artifact(path)
    place.unlink()
    place.mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(path)
