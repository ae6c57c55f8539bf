"""The hidden states of the calibration set between two blocks, off the accelerator.

x [B, L, d] of every batch is kept in CPU memory at the model's dtype, or, where all of them together are
larger than a limit, in a file without a name: it takes disk space while the run lasts and is gone with it,
however it ends. The file is read and written, not mapped, so its pages never count as the program's memory.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from dllmq.models.memory import in_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spill:
    """When hidden states go to disk: above `max_bytes` (None: never), into `folder` (None: the system's)."""

    max_bytes: int | None = None
    folder: Path | None = None


class HiddenStates:
    """One tensor for each batch, read and written by index; on `device` when read.

    Args:
        shapes: of the batches' tensors; dtype: of all of them.
        device: where they are wanted.

    Raises:
        ValueError: no file can be made in the folder of `spill`, or it is full.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, spill: Spill
    ) -> None:
        self.shapes, self.dtype, self.device, self.spill = list(shapes), dtype, device, spill
        sizes = [math.prod(shape) * dtype.itemsize for shape in self.shapes]
        self._starts = [0, *accumulate(sizes)]
        self._held: list[Tensor | None] = [None] * len(self.shapes)
        self._file: IO[bytes] | None = None
        if spill.max_bytes is not None and self.nbytes > spill.max_bytes:
            self._file = self._open()

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Tensor:
        held = self._held[index] if self._file is None else self._read(index)
        assert held is not None, f"batch {index} was never written"
        return held.to(self.device)

    def __setitem__(self, index: int, x: Tensor) -> None:
        assert (tuple(x.shape), x.dtype) == (self.shapes[index], self.dtype), "of another shape or dtype"
        if self._file is None:
            self._held[index] = x.cpu()
        else:
            self._write(index, x.cpu().contiguous())

    def close(self) -> None:
        """Gives memory and disk space back."""
        self._held = [None] * len(self.shapes)
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes]:
        folder = self.spill.folder
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder, prefix=".hidden-states-")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise self._refused(error) from error
        log.info("hidden states: %s on disk, in %s", in_bytes(self.nbytes), folder or tempfile.gettempdir())
        return file

    def _read(self, index: int) -> Tensor:
        assert self._file is not None
        x = torch.empty(self.shapes[index], dtype=self.dtype)
        self._file.seek(self._starts[index])
        read = self._file.readinto(x.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        assert read == x.nbytes, f"batch {index} was never written"
        return x

    def _write(self, index: int, x: Tensor) -> None:
        assert self._file is not None
        try:
            self._file.seek(self._starts[index])
            self._file.write(x.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> ValueError:
        where = self.spill.folder or tempfile.gettempdir()
        return ValueError(
            f"the calibration's hidden states take {in_bytes(self.nbytes)}, more than max_state_bytes="
            f"{self.spill.max_bytes}, and cannot be put on disk in {where} ({error.strerror or error}): free "
            "space there, raise max_state_bytes, or lower calibration.num_states."
        )
