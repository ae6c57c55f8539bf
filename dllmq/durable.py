"""Files that are whole or not there, and are still there after a power cut.

    write_whole(path, text)     a temporary file beside it, synced, renamed, then the folder synced
    replace(source, target)     the last two steps, for files that others have written and synced
    clean(folder)               removes temporary files whose writers are dead

A rename is an entry of the folder: until that is on disk too, a power cut may take back a file that was
reported as finished. A writer holds a lock on its temporary file, which ends with the process, however it
ends: so `clean` knows a killed writer's leftovers from the files of one that writes just now, on any machine.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO

_SUFFIX = ".tmp"
# of file systems on which a folder cannot be opened or synced: nothing more can be done there
_REFUSED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR}


def write_whole(path: Path, text: str) -> Path:
    """Writes UTF-8 text to path, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is there still, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while not _write(path, text):
        pass
    return path


def _write(path: Path, text: str) -> bool:
    """False where the temporary file went before it could be renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            _lock(file)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                replace(temporary, path)
                return True
            return False  # `clean` came before the lock, or on a machine that does not see it
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Renames a synced file over `target`, and syncs the folder."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Waits until a file's content is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on disk, where its file system can tell.

    Raises:
        OSError: the disk failed; a file system that refuses the request is left alone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    finally:
        os.close(descriptor)


def clean(folder: Path) -> None:
    """Removes what killed writers have left in a folder (not below it); files being written stay."""
    for leftover in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError), leftover.open("rb+") as file:
            if _lock(file):
                leftover.unlink(missing_ok=True)


def _lock(file: IO[str] | IO[bytes]) -> bool:
    """Takes the lock of an open file, if nobody has it and the file system knows locks; closing ends it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
