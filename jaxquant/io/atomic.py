"""Replacing a file whole: a reader finds the old content or the new, never a part; and one writer at a time.

A writer holds a lock of the operating system on what it writes. The lock ends with the process, however that ends: a
killed one leaves files behind, which the next writer finds unlocked and removes, but never a lock. Where there are no
such locks (Windows, some network file systems), two writers are not told of each other, and files that a killed one
left in a directory stay until the same file is written again.
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
    """Whether a file of this name is one that `replacing` has not finished."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def check_room(directory: str, needed: int, *, function: str, path: str) -> None:
    """Raises `QuantError` if the disk of a directory has less than ``needed`` bytes left."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        todo = "Make room, or choose another place"
        raise quant_error(function, "the disk is too full", todo=todo, path=path, needed=needed, free=free)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, nbytes: int = 0, function: str = "save") -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends without an exception.

    The content goes to a file of its own in the same directory, is synchronised to the disk and renamed. On any
    exception, KeyboardInterrupt included, that file is removed and ``path`` stays as it was. A symbolic link stays a
    link: what it points to is replaced. Permissions are those of any new file (the umask).

    Args:
      path: the file to replace or create.
      nbytes: how much will be written, as far as it is known.
      function: who asks, for the error message.

    Raises:
      QuantError: if ``path`` is a directory or its directory does not exist, somebody else is writing ``path``, or
        there is no room for ``nbytes``.
    """
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    if not os.path.isdir(directory):
        raise quant_error(function, "the directory does not exist", todo="Create it first", path=directory)
    if os.path.isdir(target):
        raise quant_error(function, "the path is a directory", todo="Name a file in it", path=target)
    # A name may be as long as the file system allows; this one is short, and the same for every writer of the target.
    temporary = os.path.join(directory, f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{_SUFFIX}")
    for left in filter(is_temporary, os.listdir(directory)):
        _remove_abandoned(os.path.join(directory, left))
    with _created(temporary, function, target) as file:
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
    lock = os.dup(descriptor)  # the file is closed before it is renamed, and the lock is kept until after
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
    """Makes a directory, if it is not there, for one writer: nobody else gets it until the block ends.

    A directory that is empty when the block ends with an exception is removed. It may be renamed inside the block.

    Raises:
      QuantError: if another writer has it, or what is there is no directory; ``target`` is what they write.
    """
    with contextlib.suppress(FileExistsError):
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
    """A new, empty and locked file, in the place of one that a killed writer left; None if a living one has it."""
    for _ in range(8):  # as often as others, looking for what is abandoned, may come in between
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
    """Removes a file whose writer was killed; False if a living one has it, or that cannot be known.

    Where there are no locks it cannot be known, and ``even_unlocked`` removes the file all the same.
    """
    descriptor, lock = _opened(path, os.O_RDWR)
    if descriptor is None:
        return not os.path.lexists(path)
    try:
        if lock is _Lock.TAKEN or (lock is _Lock.NONE and not even_unlocked):
            return False
        os.remove(path)  # under the lock: nobody else can have taken it meanwhile
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _opened(path: str, flags: int) -> tuple[int | None, _Lock]:
    """A descriptor of what is at a path, and its lock; no descriptor if it is gone, or not ours to open."""
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
    """Whether a path still leads to what was opened: its writer may have renamed or removed it meanwhile."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
