"""What requests of the Open Inference Protocol become in memory, by the parsers' own peaks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import MalformedRequest, TooLarge
from service.http.oip import grpc_codec, grpc_messages, json_codec, tensors
from service.http.oip.tensors import Declared, Limits

ROOT = Path(__file__).parents[5]
LIMITS = Limits(batch=64, area=608 * 448)
MB = 1_000_000
MOST = 200
"""Megabytes."""
REFUSED = "refused"
CANVAS = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
ENCODED = {"name": "encoded_images", "datatype": "BYTES", "shape": [4096]}
INFER = next(
    method.request
    for method in grpc_messages.load()[grpc_messages.INFERENCE]
    if method.name == "ModelInfer"
)


def of_data(data: str, declared: dict[str, Any] = CANVAS) -> bytes:
    """A JSON body with an input of `data`, as JSON."""
    fields = json.dumps(declared)[1:-1]
    return f'{{"inputs": [{{{fields}, "data": {data}}}]}}'.encode()


def listed(value: str, size: int) -> str:
    """A JSON list of as many values as take `size` characters."""
    return f"[{','.join([value] * (size // (len(value) + 1)))}]"


def beside(name: str, value: str) -> bytes:
    """A JSON body with another field of `value`, as JSON."""
    return f'{{"{name}": {value}, "inputs": [{json.dumps(CANVAS)}]}}'.encode()


def varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def field(number: int, content: bytes) -> bytes:
    """A field of wire type 2."""
    return varint(number << 3 | 2) + varint(len(content)) + content


DELETE = "\x7f"
"""Four characters to repr()."""
NEST = "[" * 1000 + "]" * 1000
JSON: dict[str, Callable[[], bytes]] = {
    "a long string among empty ones": lambda: of_data(json.dumps(["a" * 60_000] + [""] * 4095)),
    "a longer string among empty ones": lambda: of_data(json.dumps(["a" * MB] + [""] * 100_000)),
    "a string of 12 MB among empty ones": lambda: of_data(
        json.dumps(["a" * 12 * MB] + [""] * 4095)
    ),
    "such strings as images": lambda: of_data(json.dumps(["a" * 60_000] + [""] * 4095), ENCODED),
    "empty lists, 1 MB": lambda: of_data(listed("[]", MB)),
    "as many lists and values as pass": lambda: of_data(listed("[1]", 4 * 990_000)),
    "empty lists, 30 MB": lambda: of_data(listed("[]", 30 * MB)),
    "ragged lists": lambda: of_data(listed("[0],[0,0]", MB)),
    "nested lists, 1 MB": lambda: of_data(listed(NEST, MB)),
    "nested lists, 30 MB": lambda: of_data(listed(NEST, 30 * MB)),
    "lists after a number": lambda: of_data(f"[0,{listed('[]', MB)}]"),
    "numbers, 30 MB": lambda: of_data(listed("0.5", 30 * MB)),
    "as many numbers as pass": lambda: of_data(listed("0.5", 4 * 990_000)),
    "numbers of many digits": lambda: of_data(listed("9" * 300, MB)),
    "short strings": lambda: of_data(listed('"ab"', 5 * 990_000)),
    "nulls": lambda: of_data(listed("null", MB)),
    "objects": lambda: of_data(listed("{}", MB)),
    "objects in objects": lambda: of_data('{"":' * 900 + "0" + "}" * 900),
    "one object of many keys": lambda: of_data(
        json.dumps({f"{key:x}": 0 for key in range(MB // 9)})
    ),
    "a string of wide characters": lambda: of_data(f'["😀{"a" * 30 * MB}"]', ENCODED),
    "a wide name": lambda: of_data("[]", {"name": "😀" * (7 * MB)}),
    "a shape of numbers": lambda: of_data("[]", CANVAS | {"shape": [2**63] * (MB // 20)}),
    "a datatype of lists": lambda: of_data("[]", CANVAS | {"datatype": [[]] * (MB // 3)}),
    "an id of control characters": lambda: beside("id", f'"{DELETE * 30 * MB}"'),
    "parameters": lambda: beside(
        "parameters", json.dumps({f"{key:x}": 0 for key in range(MB // 9)})
    ),
    "parameters of lists": lambda: beside("parameters", f'{{"timeout": {listed("[]", MB)}}}'),
    "outputs": lambda: beside("outputs", listed("{}", MB)),
    "an output's name of lists": lambda: beside("outputs", f'[{{"name": {listed("[]", MB)}}}]'),
    "many inputs": lambda: b'{"inputs": ' + listed("{}", MB).encode() + b"}",
    "no object": lambda: listed("[]", MB).encode(),
}
TYPED = {"bool": 1, "int32": 2, "int64": 3, "uint32": 4, "uint64": 5, "float": 6, "double": 7}
GRPC: dict[str, Callable[[], bytes]] = {
    "empty inputs": lambda: b"\x2a\x00" * (15 * MB),
    "empty outputs": lambda: b"\x32\x00" * (15 * MB),
    "empty raw contents": lambda: b"\x3a\x00" * (15 * MB),
    "empty parameters": lambda: b"\x22\x00" * (15 * MB),
    "parameters": lambda: b"".join(field(4, field(1, b"%d" % key)) for key in range(3 * MB)),
    "parameters of an input": lambda: field(5, b"\x22\x00" * (15 * MB)),
    "parameters of an output": lambda: field(6, b"\x12\x00" * (15 * MB)),
    "elements of bytes": lambda: field(5, field(5, b"\x42\x00" * (15 * MB))),
    "shape": lambda: field(5, field(3, bytes(30 * MB))),
    "shape, not packed": lambda: field(5, b"\x18\x00" * (15 * MB)),
    "contents again and again": lambda: field(5, b"\x2a\x00" * (15 * MB)),
    "unknown fields": lambda: b"\x78\x00" * (15 * MB),
    "unknown fields between inputs": lambda: b"\x2a\x00\x78\x00" * (7 * MB),
    "unknown fields of an input": lambda: field(5, b"\x78\x00" * (15 * MB)),
    "unknown fields of two numbers": lambda: b"\x78\x00\xf8\x01\x00" * (6 * MB),
    "groups": lambda: b"\x7b\x7c" * (15 * MB),
    "groups in groups": lambda: b"\x7b" * (30 * MB),
    "a long name": lambda: field(1, b"a" * (30 * MB)),
    "a long id": lambda: field(3, b"a" * (30 * MB)),
    "tags without end": lambda: b"\xff" * (30 * MB),
    "a length beyond the end": lambda: b"\x2a\xff\xff\xff\xff\x07" * (5 * MB),
    **{
        f"{kind}, packed": lambda number=number: field(5, field(5, field(number, bytes(30 * MB))))  # type: ignore[misc]
        for kind, number in TYPED.items()
    },
    "as many numbers as pass": lambda: field(5, field(5, field(5, bytes(8 * MB)))),
    "numbers, not packed": lambda: field(5, field(5, b"\x20\x00" * (15 * MB))),
}


def parse_message(content: bytes) -> None:
    grpc_codec.parse(grpc_codec.read_infer(content, INFER, LIMITS.batch), LIMITS)


def parse_body(content: bytes) -> None:
    json_codec.parse(content, None, LIMITS)


def outcome(parse: Callable[[bytes], None], content: bytes) -> str:
    try:
        parse(content)
    except (MalformedRequest, TooLarge) as error:
        return REFUSED if len(str(error)) < 600 else f"an error of {len(str(error))} characters"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "accepted"


def measure() -> None:
    """Print (outcome, megabytes) of every body, as JSON: each is parsed in a child process."""
    found = {}
    for parse, table in ((parse_body, JSON), (parse_message, GRPC)):
        for name, make in table.items():
            content = make()
            found[f"{parse.__name__}: {name}"] = _in_a_child(parse, content)
    print(json.dumps(found))


def _in_a_child(parse: Callable[[bytes], None], content: bytes) -> tuple[str, float]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # What would take gigabytes must not take them from other tests.
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = outcome(parse, content)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(write, json.dumps((told, peak / 1024)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(told)) if told else ("the process died", 0.0)


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[str, float]]:
    """Of a process of its own: this one has threads, and memory that was freed and kept."""
    command = f"from {__name__} import measure; measure()"
    # What was freed goes back at once, or a child would find it instead of taking more.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "name",
    [f"parse_body: {name}" for name in JSON] + [f"parse_message: {name}" for name in GRPC],
)
def test_request_memory_is_bounded(measured: dict[str, tuple[str, float]], name: str) -> None:
    told, megabytes = measured[name]
    assert told == REFUSED
    assert megabytes < MOST


FIELDS = 6
EMPTY = [varint(number << 3 | 2) + b"\x00" for number in (1, 2, 3, 4, 5, 6, 7, 8, 15, 16)]
some_fields = st.lists(st.sampled_from([*EMPTY, b"\x78\x00"]), max_size=12).map(b"".join)


@settings(max_examples=500)
@given(request=some_fields, tensor=some_fields, contents=some_fields, rest=st.binary(max_size=3))
def test_message_has_no_more_fields_than_counted(
    request: bytes, tensor: bytes, contents: bytes, rest: bytes
) -> None:
    content = request + field(5, tensor + field(5, contents)) + rest
    try:
        grpc_codec.check_size(content, INFER.DESCRIPTOR, fields=FIELDS)
        message = INFER.FromString(content)
    except (MalformedRequest, DecodeError):
        return
    both = [*message.inputs, *message.outputs]
    built = [
        *both,
        *message.raw_input_contents,
        *message.parameters,
        *(name for each in both for name in each.parameters),
        *(element for each in message.inputs for element in each.contents.bytes_contents),
    ]
    assert len(built) <= FIELDS


def test_largest_canvas_is_accepted_as_numbers() -> None:
    limits = Limits(batch=64, area=640 * 640)
    image = np.random.default_rng(1).integers(0, 256, (1, 640, 640, 3), np.uint8)
    declared = CANVAS | {"shape": list(image.shape)}
    for data in (image.tolist(), image.ravel().tolist()):
        parsed = json_codec.parse(of_data(json.dumps(data), declared), None, limits)
        np.testing.assert_array_equal(parsed.request.inputs["images"], image)
    two = of_data(json.dumps([*data, *data]), CANVAS | {"shape": [2, *image.shape[1:]]})
    with pytest.raises(MalformedRequest, match="send large tensors as binary data"):
        json_codec.parse(two, None, limits)


def test_other_threads_run_while_a_list_is_converted() -> None:
    declared = Declared("images", "UINT8", (1, 608, 448, 3))
    values = [255] * declared.count
    turns, done, interval = 0, threading.Event(), sys.getswitchinterval()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    sys.setswitchinterval(1e-5)
    other.start()
    try:
        for _ in range(10):
            assert tensors.from_values(declared, values).min() == 255
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    # There are 200 pieces of the list, ten times.
    assert turns > 200
