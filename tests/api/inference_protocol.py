"""Requests of the Open Inference Protocol, written by hand, and answers read the same way."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEADER = "Inference-Header-Content-Length"
INFER = "/v2/models/tiny/infer"
DTYPES = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32}


def canvas(*images: Image.Image) -> NDArray[np.uint8]:
    """(B, H, W, 3) of images of one size."""
    return np.stack([np.asarray(image) for image in images])


def tensor(name: str, values: NDArray[Any], datatype: str) -> dict[str, Any]:
    """An input with its data in the JSON."""
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(values.shape),
        "data": values.ravel().tolist(),
    }


def images(values: NDArray[np.uint8]) -> dict[str, Any]:
    return tensor("images", values, "UINT8")


def score(value: float) -> dict[str, Any]:
    return {"name": "score_threshold", "datatype": "FP32", "shape": [1], "data": [value]}


def base64_images(*files: bytes) -> dict[str, Any]:
    return {
        "name": "encoded_images",
        "datatype": "BYTES",
        "shape": [len(files)],
        "data": [base64.b64encode(file).decode() for file in files],
    }


def prefixed(*files: bytes) -> bytes:
    """A BYTES tensor's raw data."""
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def binary_images(*files: bytes, size: int | None = None) -> tuple[dict[str, Any], bytes]:
    raw = prefixed(*files)
    declared = {
        "name": "encoded_images",
        "datatype": "BYTES",
        "shape": [len(files)],
        "parameters": {"binary_data_size": len(raw) if size is None else size},
    }
    return declared, raw


def with_raw(
    document: dict[str, Any], raw: bytes, header_length: int | str | None = None
) -> dict[str, Any]:
    """A request's body and headers: JSON, and raw bytes behind it."""
    header = json.dumps(document).encode()
    length = len(header) if header_length is None else header_length
    return {"content": header + raw, "headers": {HEADER: str(length)}}


def outputs(answer: httpx.Response) -> dict[str, NDArray[Any]]:
    """The outputs of an answer, whichever way each was written; their dtypes and shapes checked."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get(HEADER)
    header = answer.content if length is None else answer.content[: int(length)]
    raw = b"" if length is None else answer.content[int(length) :]
    found = {}
    for each in json.loads(header)["outputs"]:
        dtype = DTYPES[each["datatype"]]
        if "data" in each:
            values = np.array(each["data"], dtype)
        else:
            size = each["parameters"]["binary_data_size"]
            values, raw = np.frombuffer(raw[:size], dtype), raw[size:]
        found[each["name"]] = values.reshape(each["shape"])
    assert raw == b"", "bytes that belong to no output"
    return found
