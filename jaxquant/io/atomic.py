"""Atomic replacement of files, by one writer at a time: a reader sees the old content or the new, never a part.

A writer holds a lock of the operating system on the file or directory that it writes. The lock ends with the process:
a killed process leaves files behind, which the next writer finds unlocked and removes, but no lock. Where such locks do
not exist (Windows, some network file systems), two writers do not notice each other, and files of a killed process
stay in a directory until the same file is written again.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from jaxquant.core.errors import QuantError, quant_error

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

__all__ = ["check_room", "claimed", "is_temporary", "replacing"]

_SUFFIX = ".jaxquant.tmp"


def is_temporary(name: str) -> bool:
    """Whether a name is that of a file that `replacing` has not finished."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def check_room(directory: str, needed: int, *, function: str, path: str) -> None:
    """Raises `QuantError` if the disk of a directory has less than ``needed`` bytes left."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        todo = "Make room, or choose another place"
        raise quant_error(function, "the disk is too full", todo=todo, path=path, needed=needed, free=free)


#: No room, no quota left, or a file larger than its file system holds.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


@contextlib.contextmanager
def _room(function: str, path: str) -> Iterator[None]:
    """Raises `QuantError` where the block finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        todo = "Make room, or choose another place"
        raise quant_error(function, "the disk is full", todo=todo, path=path, error=error.strerror) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, nbytes: int = 0, function: str = "save") -> Iterator[BinaryIO]:
    """A file to write, which replaces ``path`` when the block ends without an exception.

    The content is written to a temporary file in the same directory, synchronised to the disk and renamed. On any
    exception, KeyboardInterrupt included, this file is removed and ``path`` stays unchanged. A symbolic link stays a
    link: its target is replaced. Permissions are those of a new file (the umask).

    Args:
      path: the file to replace or create.
      nbytes: the size to be written, as far as it is known.
      function: the public function that errors name.

    Raises:
      QuantError: if ``path`` is a directory or its directory does not exist, another writer has ``path``, or the disk
        has no room for ``nbytes`` or fills up.
    """
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    if not os.path.isdir(directory):
        raise quant_error(function, "the directory does not exist", todo="Create it first", path=directory)
    if os.path.isdir(target):
        raise quant_error(function, "the path is a directory", todo="Name a file in it", path=target)
    # The target's name may have the greatest length allowed, so the temporary name is a hash, equal for all writers.
    temporary = os.path.join(directory, f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{_SUFFIX}")
    for left in filter(is_temporary, os.listdir(directory)):
        _remove_abandoned(os.path.join(directory, left))
    with _room(function, target), _created(temporary, function, target) as file:
        check_room(directory, nbytes, function=function, path=target)
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _created(temporary: str, function: str, target: str) -> Iterator[BinaryIO]:
    """A new file under a lock, renamed to ``target`` at the end, or removed."""
    descriptor = _new(temporary)
    if descriptor is None:
        raise _busy(function, target)
    lock = os.dup(descriptor)  # the file is closed before it is renamed; the lock lasts until after the renaming
    try:
        with open(descriptor, "wb") as file:
            yield file
        if not _is_at(lock, temporary):
            raise _busy(function, target)
        os.replace(temporary, target)
    except BaseException:
        if _is_at(lock, temporary):
            os.remove(temporary)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def claimed(directory: str, *, function: str, target: str) -> Iterator[None]:
    """Makes a directory, if it does not exist, and locks it for one writer until the block ends.

    If the block ends with an exception and the directory is empty, it is removed. It may be renamed inside the block.

    Raises:
      QuantError: if another writer has it, the path is not a directory, or the disk is full; the error names
        ``target``, the final path.
    """
    with _room(function, target), contextlib.suppress(FileExistsError):
        os.mkdir(directory)
    if not os.path.isdir(directory):
        todo = f"Remove {directory}, or choose another destination"
        raise quant_error(function, "a file is in the way", todo=todo, path=target)
    descriptor, lock = _opened(directory, os.O_RDONLY)
    if lock is _Lock.TAKEN or not os.path.isdir(directory):  # or it was renamed just now
        if descriptor is not None:
            os.close(descriptor)
        raise _busy(function, target)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _busy(function: str, target: str) -> QuantError:
    todo = "Wait for it, or choose another destination"
    return quant_error(function, "another process or thread is writing this", todo=todo, path=target)


def _new(path: str) -> int | None:
    """A new, empty, locked file, which replaces one of a killed writer; None if a living writer has the file."""
    for _ in range(8):  # other writers that look for abandoned files may interfere a few times
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            if not _remove_abandoned(path, even_unlocked=True):
                return None
            continue
        if _lock(descriptor) is not _Lock.TAKEN and _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
    return None


def _remove_abandoned(path: str, *, even_unlocked: bool = False) -> bool:
    """Removes a file whose writer was killed; False if a living writer has it, or if this cannot be known.

    It cannot be known where locks do not exist; ``even_unlocked`` then removes the file anyway.
    """
    descriptor, lock = _opened(path, os.O_RDWR)
    if descriptor is None:
        return not os.path.lexists(path)
    try:
        if lock is _Lock.TAKEN or (lock is _Lock.NONE and not even_unlocked):
            return False
        os.remove(path)  # under the lock, so no other writer can have taken it
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _opened(path: str, flags: int) -> tuple[int | None, _Lock]:
    """A descriptor of the file at a path, and its lock; no descriptor if the file is gone or may not be opened."""
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None, _Lock.NONE
    lock = _lock(descriptor)
    if _is_at(descriptor, path):
        return descriptor, lock
    os.close(descriptor)
    return None, _Lock.NONE


class _Lock(enum.Enum):
    OURS = "this process has it until the descriptor is closed"
    TAKEN = "another one has it"
    NONE = "there are no locks here"


def _lock(descriptor: int) -> _Lock:
    if fcntl is None:
        return _Lock.NONE
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _Lock.TAKEN if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else _Lock.NONE
    return _Lock.OURS


def _is_at(descriptor: int, path: str) -> bool:
    """Whether a path still leads to the opened file, which its writer may have renamed or removed."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
