"""What a file or a body holds, by its first bytes."""

from __future__ import annotations

import base64
import gzip
import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.contents import is_lfs_pointer, kind_of
from tests.images import LFS_POINTER, encoded, noise, one_red

JPEG = encoded(noise((64, 64)), "JPEG")
PNG = encoded(one_red())


def archive() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("cells.jpg", JPEG)
    return target.getvalue()


KINDS = [
    (b"", "nothing (0 bytes)"),
    (JPEG, "a JPEG image"),
    (PNG, "a PNG image"),
    (encoded(one_red(), "WEBP"), "a WebP image"),
    (encoded(one_red(), "GIF"), "a GIF image"),
    (encoded(one_red(), "BMP"), "a BMP image"),
    (encoded(one_red(), "TIFF"), "a TIFF image"),
    (encoded(one_red(), "TIFF", big_tiff=True), "a TIFF image"),
    (encoded(one_red(), "ICO"), "an icon"),
    (encoded(one_red(), "AVIF"), "an AVIF image"),
    (encoded(one_red(), "JPEG2000"), "a JPEG 2000 image"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\1\xd4meta", "a HEIC image"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic\0\0\1\xd4meta", "a HEIC image"),
    (b"\0\0\0\x1cftypisom\0\0\2\0isomiso2mp41\0\0\0\x08free", "an MP4 or QuickTime video"),
    (bytes(128) + b"DICM\2\0\0\0UL", "a DICOM file"),
    (encoded(one_red(), "PDF"), "a PDF document"),
    (archive(), "a ZIP archive"),
    (gzip.compress(JPEG), "a gzip archive"),
    (JPEG.decode("utf-8", "replace").encode(), "an image that was read as text"),
    (PNG.decode("utf-8", "replace").encode(), "an image that was read as text"),
    (JPEG.decode("latin-1").encode(), "an image that was read as text"),
    (PNG.decode("latin-1").encode(), "an image that was read as text"),
    (LFS_POINTER, "a Git LFS pointer"),
    (LFS_POINTER.replace(b"\n", b""), "a Git LFS pointer"),
    (b"<!DOCTYPE html>\n<html><title>404</title>", "an HTML page"),
    (b"\r\n<HTML>", "an HTML page"),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    (b'<?xml version="1.0"?>\n<!-- a --><svg/>', "an SVG drawing"),
    (b'<?xml version="1.0"?>\n<annotation/>', "XML text"),
    (b'{"image": "aGk="}', "JSON text"),
    (b"\xef\xbb\xbf [1]", "JSON text"),
    (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n', "a multipart form"),
    (b"--b\r\ncontent-type: image/png\r\n\r\n" + PNG, "a multipart form"),
    (b"data:image/png;base64,iVBORw0KGgo=", "a data URL"),
    (b"https://example.org/cells.jpg?size=large", "a URL"),
    (b"file:///home/me/cells.jpg", "a URL"),
    (repr(JPEG).encode(), "bytes as Python prints them"),
    (base64.b64encode(JPEG), "base64 text"),
    (base64.encodebytes(JPEG), "base64 text"),
    (base64.urlsafe_b64encode(JPEG), "base64 text"),
    (base64.b64encode(JPEG[:20]), "base64 text"),
    (base64.b64encode(JPEG).decode().encode("utf-16"), "UTF-16 text"),
    (b"image=@cells.jpg", "form fields"),
    (b"image=%2F9j%2F4AAQ&id=a", "form fields"),
    (b"@cells.jpg", "the name of a file ('@cells.jpg')"),
    (b"C:\\Users\\me\\cells.PNG\r\n", "the name of a file"),
    (b"Dear server, I am no image at all.\n" * 20, "text ('Dear server, I am no image at all."),
    (("é" * 600).encode(), "text ('éé"),
    (b"a" + ("日" * 600).encode(), "text ('a日"),
    (b"\0\1\2\3\4\5\6\7\x08\x09", "bytes that begin with 00 01 02 03 04 05 06 07"),
    (b"caf\xe9", "bytes that begin with 63 61 66 e9"),
]


@pytest.mark.parametrize(("data", "kind"), KINDS)
def test_kind_is_named_by_the_first_bytes(data: bytes, kind: str) -> None:
    for given_as in (data, bytearray(data), memoryview(data)):
        assert kind_of(given_as).startswith(kind)


@given(st.binary(max_size=600))
def test_any_bytes_have_a_short_name(data: bytes) -> None:
    assert 0 < len(kind_of(data)) < 200


def test_lfs_pointer_is_recognised_by_its_beginning() -> None:
    assert is_lfs_pointer(LFS_POINTER[:64])
    assert not is_lfs_pointer(b"version 1\n")
    assert not is_lfs_pointer(encoded(Image.new("RGB", (8, 8))))
