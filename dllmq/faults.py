"""What the machine refused, in one sentence with the way out: a full or read-only disk, too little memory."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO,
    errno.ESTALE,
}  # fmt: skip
# Allocators of torch, drivers, cuDNN, cuBLAS and C++ say it in words of their own, most in a RuntimeError.
_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory",
    "_status_alloc_failed", "bad_alloc",
)  # fmt: skip
_LESS = {
    "load": "use memory=stream, or model.dtype=bfloat16",
    "calibrate": "lower calibration.batch_size, or use memory=stream",
    "reference": "lower calibration.batch_size, or use memory=stream",
    "quantize": "lower calibration.batch_size or calibration.num_states, or use memory=stream",
    "evaluate": "lower eval.batch_size, and eval.mc_batch_size for tasks that choose",
    "fidelity": "lower calibration.batch_size",
}


def in_words(error: Exception, folder: Path, stage: str = "") -> str | None:
    """The sentence for a user, None where the error is not the machine's.

    Args:
        folder: where the run writes.
        stage: in which it was raised, as in the record's costs: "quantize".
    """
    code = _code(error)
    if code in _FULL:
        return (
            f"no space is left on the disk of {folder} ({error}): free some, and the same command continues; "
            "what was finished is kept."
        )
    if code in _CLOSED and _concerns(error, folder):
        return (
            f"{folder} cannot be written any more ({error}): mend that, and the same command continues; what "
            "was finished is kept. Or give another folder with hydra.sweep.dir=<folder> (of a single run: "
            "hydra.run.dir=<folder>)."
        )
    if is_out_of_memory(error):
        way_out = _LESS.get(stage, "lower eval.batch_size and calibration.batch_size, or use memory=stream")
        return (
            f"there is not enough memory{f' to {stage}' if stage else ''} ({_first(error)}): {way_out}; the "
            "same command with that continues or begins again."
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY)


def check_writable(folder: Path) -> None:
    """Whether files can be made in a folder, which need not be there yet; makes nothing.

    Raises:
        ValueError: it cannot.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(_closed(folder, f"{place} is a file"))
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(_closed(folder, f"{place} is read-only"))


def _closed(folder: Path, why: object) -> str:
    return (
        f"{folder} cannot be written ({why}): start the run where it can, or give a folder with "
        "hydra.sweep.dir=<folder> (of a single run: hydra.run.dir=<folder>)."
    )


def _code(error: Exception) -> int | None:
    """errno; safetensors tells it in words."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found else None
    return None


def _concerns(error: Exception, folder: Path) -> bool:
    """Whether the file that was refused lies in the folder; where none is named it does."""
    name = getattr(error, "filename", None)
    return name is None or Path(str(name)).absolute().is_relative_to(folder.absolute())


def _first(error: Exception) -> str:
    """The first sentence of a message that goes on for a paragraph."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return text[:200] or type(error).__name__
