"""Pointers of Git LFS: short texts that stand for large files which were not downloaded."""

import os

_POINTER = b"version https://git-lfs"
SENTENCE = "is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder"


def is_pointer(content: bytes) -> bool:
    """Whether these bytes, the first of a file or all of them, are a pointer."""
    return content.startswith(_POINTER)


def is_pointer_file(path: str | os.PathLike) -> bool:
    """Whether a local file is a pointer; OSError where it cannot be read."""
    with open(path, "rb") as file:
        return is_pointer(file.read(len(_POINTER)))
