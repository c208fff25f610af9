"""Replacing a file whole: a reader finds the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from jaxquant.core.errors import quant_error

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, function: str = "save") -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends without an exception.

    The content goes to a file of its own in the same directory, is synchronised to the disk and renamed. On any
    exception, KeyboardInterrupt included, that file is removed and ``path`` stays as it was. A symbolic link stays a
    link: what it points to is replaced. Permissions are those of any new file (the umask).

    Args:
      path: the file to replace or create.
      function: who asks, for the error message.

    Raises:
      QuantError: if ``path`` is a directory or its directory does not exist.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    if not os.path.isdir(directory):
        raise quant_error(function, "the directory does not exist", todo="Create it first", path=directory)
    if os.path.isdir(target):
        raise quant_error(function, "the path is a directory", todo="Name a file in it", path=target)
    temporary = os.path.join(directory, f".{secrets.token_hex(8)}.tmp")
    try:
        # "x" and not tempfile, whose files only their owner may read.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
