"""Names what a file or a body holds by its first bytes, for the errors that refuse it."""

from __future__ import annotations

import re
from typing import Final

from service.errors import shown

_HEAD: Final = 512
_SHOWN: Final = 40
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_READ_AS_TEXT: Final = "an image that was read as text, which destroys it"

_BINARY: Final = (
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image"),
    (rb"\x89PNG[\r\n]*\x1a", "a PNG image whose line breaks were removed or changed on the way"),
    (rb"RIFF.{4}WEBP", "a WebP image"),
    (rb"GIF8", "a GIF image"),
    (rb"BM.{4}\0{4}", "a BMP image"),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF image"),
    (rb"\0\0\x01\0", "an icon"),
    (rb"8BPS", "a Photoshop image"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL image"),
    (rb".{4}ftyp.*avi[fs]", "an AVIF image"),
    (rb".{4}ftyp.*(hei[cmsx]|hev[cmsx]|mif1|msf1)", "a HEIC image"),
    (rb".{4}ftyp", "an MP4 or QuickTime video"),
    (rb".{128}DICM", "a DICOM file"),
    (rb"%PDF-", "a PDF document"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    # JPEG and PNG, as UTF-8 of unknown characters and of Latin-1.
    (rb"(\xef\xbf\xbd){3}|\xef\xbf\xbdPNG", _READ_AS_TEXT),
    (rb"\xc3\xbf\xc3\x98\xc3\xbf|\xc2\x89PNG", _READ_AS_TEXT),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text"),
    (rb"--\S+\r?\n(?i:content)-", "a multipart form"),
    (re.escape(_LFS_POINTER), "a Git LFS pointer (`git lfs pull` fetches the file)"),
)
"""How the head begins, as a regular expression; the first that fits."""
_TEXTS: Final = (
    (r"<(!doctype html|html|head|body|script)\b.*", "an HTML page"),
    (r"<(.*<)?svg\b.*", "an SVG drawing"),
    (r"<.*", "XML text"),
    (r"[{\[].*", "JSON text"),
    (r"data:.*", "a data URL"),
    (r"[a-z][a-z0-9+.-]*://\S*", "a URL"),
    (r"b['\"].*", "bytes as Python prints them"),
    (r"[a-z0-9+/_\r\n-]{16,}=*", "base64 text"),
    (r"[^\s=&]+=\S*", "form fields"),
    (r"@\S[^\n]*|[^\n]+\.(jpe?g?|jfif|png|webp|gif|bmp|tiff?|hei[cf]|avif)", "the name of a file"),
    (r".*", "text"),
)
"""What the head is, from end to end and without white space around it."""


def is_lfs_pointer(head: bytes) -> bool:
    r"""Return whether a file that begins with `head` is a Git LFS pointer.

    Such a text of three lines stands in a checkout for a file that `git lfs pull` fetches.

    >>> is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a")
    True
    """
    return head.startswith(_LFS_POINTER)


def kind_of(data: bytes | bytearray | memoryview) -> str:
    """Return what data looks like by its first bytes, as the object of a sentence.

    >>> kind_of(b"GIF89a"), kind_of(b"/home/me/cells.jpg")
    ('a GIF image', "the name of a file ('/home/me/cells.jpg')")
    """
    head = bytes(data[:_HEAD])
    if not head:
        return "nothing (0 bytes)"
    for signature, name in _BINARY:
        if re.match(signature, head, re.DOTALL):
            return name
    text = _text(head)
    if text is None:
        return f"bytes that begin with {head[:8].hex(' ')}"
    flags = re.DOTALL | re.IGNORECASE
    name = next(name for pattern, name in _TEXTS if re.fullmatch(pattern, text, flags))
    return f"{name} ({shown(text[:_SHOWN])})"


def _text(head: bytes) -> str | None:
    """Return the head as text without white space around it; None if it is not UTF-8."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A head may end within a character.
        if len(head) < _HEAD or error.start < _HEAD - 3:
            return None
        text = head[: error.start].decode("utf-8-sig")
    text = text.strip()
    return None if any(each < " " and not each.isspace() for each in text) else text
