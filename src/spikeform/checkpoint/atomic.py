"""Replacing a folder by another one so that a kill at any moment leaves one of the two, whole.

The new version is written to the sibling ``NAME.tmp-PID``, then exchanged with ``NAME`` in one system call
(renameat2 on Linux). Where that call is missing, two renames do it: ``NAME`` to ``NAME.old-PID``, then
``NAME.tmp-PID`` to ``NAME``; a kill between them is undone by ``recover``, which every save, load and verify
calls first.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spikeform.errors import CheckpointError

MARKER = ".spikeform-saving"  # says that a temporary folder is ours to delete, before the manifest does
MANIFEST_NAME = "spikeform.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; it takes the place of ``path`` unless an error is raised.

    Args:
        path: absolute path of the folder to write: missing, empty, or a checkpoint that may be replaced.

    Raises:
        CheckpointError: another process is saving to ``path`` at this moment.
        OSError: the folder cannot be created, synced or renamed; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(path, "tmp")
    if busy := recover(path):
        raise CheckpointError(
            f"another process is saving to {path} (it writes {busy[0].name}). Wait for it, or save "
            "elsewhere; if none is running, delete that folder"
        )
    folder.mkdir()
    lock = _lock(folder)  # the system drops it when this process dies, however it dies
    try:
        (folder / MARKER).touch()
        yield folder
        (folder / MARKER).unlink()
        _sync_tree(folder)
        _replace(folder, path)
    finally:
        _delete(folder)  # the old version after an exchange, the unfinished one after an error
        if lock is not None:
            os.close(lock)


def recover(path: Path) -> list[Path]:
    """Undo or finish what killed saves to ``path`` left behind.

    If ``path`` is missing and its old version lies beside it, the old version is put back. Leftovers of dead
    saves are deleted.

    Args:
        path: the checkpoint's folder, which need not exist.

    Returns:
        The temporary folders of saves to ``path`` that are still running.
    """
    path = path.resolve()
    pattern = re.compile(re.escape(path.name) + r"\.(tmp|old)-\d+")
    try:
        # Listed before looking at `path`: an old version seen here and then a `path` mean a finished swap.
        found = sorted(p for p in path.parent.iterdir() if pattern.fullmatch(p.name) and not p.is_symlink())
    except OSError:
        return []  # no such parent, or one that may not be listed: nothing was left behind that we could see
    temporary = [p for p in found if ".tmp-" in p.name[len(path.name) :]]
    old = [p for p in found if p not in temporary and (p / MANIFEST_NAME).is_file()]
    if old and not path.exists():
        _put_back(old.pop(), path)
    busy = [p for p in temporary if p.is_dir() and not _delete_if_dead(p)]
    for folder in old:
        with suppress(OSError):
            _delete_if_dead(folder.rename(_beside(path, "tmp")))
    return busy


def _put_back(old: Path, path: Path) -> None:
    try:
        os.rename(old, path)
        _sync_names(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"a save to {path} was killed, and the old version cannot be put back: {error}. Rename {old.name}"
        ) from error


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{os.getpid()}")


def _replace(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``. Afterwards ``new`` is gone or holds what ``path`` was."""
    try:
        os.rename(new, path)  # POSIX: one step where `path` is missing or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, path):
            _replace_in_two_steps(new, path)
    _sync_names(path.parent)


def _replace_in_two_steps(new: Path, path: Path) -> None:
    old = _beside(path, "old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    _sync_names(path.parent)
    with suppress(OSError):  # if it stays, the next `recover` deletes it
        os.rename(old, new)  # `.old-` always means a whole version; this one is to be deleted


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one system call; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    names = os.fsencode(first), os.fsencode(second)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives. None if the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _delete_if_dead(folder: Path) -> bool:
    """Delete a temporary folder of ours whose process is dead. False if the process lives.

    A lock tells, not the process number: numbers come again, in containers above all. A folder that cannot be
    locked counts as living: better to ask than to delete another machine's work.
    """
    try:
        lock = _lock(folder)
    except FileNotFoundError:
        return True  # finished or removed in this instant
    except PermissionError:
        return False
    if lock is None:
        return False
    ours = (folder / MARKER).is_file() or (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())
    if ours:
        _delete(folder)
    os.close(lock)
    return True


def _delete(folder: Path) -> None:
    """Delete a folder of ours; what shows that it is ours goes last, in case of a kill."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name not in (MARKER, MANIFEST_NAME):
                entry.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync_names(folder: Path) -> None:
    """Ask the disk to hold renames. Both versions are whole, so a file system that cannot is no error."""
    with suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    """Ask the disk to hold a file, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
