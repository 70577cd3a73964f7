"""Names what a file holds by its first bytes, for the errors that refuse it."""

from __future__ import annotations

from typing import Final

_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(head: bytes) -> bool:
    r"""Return whether a file that begins with `head` is a Git LFS pointer.

    Such a text of three lines stands in a checkout for a file that `git lfs pull` fetches.

    >>> is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a")
    True
    """
    return head.startswith(_LFS_POINTER)
