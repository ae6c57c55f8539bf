"""Forwards as CUDA graphs: a step of fixed shape is recorded once and replayed, without Python in between.

A forward of LLaDA-8B is some thousand kernels. At a small batch the GPU waits for the next one to be launched
most of the time; a replay launches all of them at once. The kernels, and so the numbers, are those of the
forward that was recorded.

A shape (rows, columns, whether there are pads) is recorded when it comes for the second time. Rows leave a
batch while it is denoised, so rows are rounded up to the next of `ROWS` with copies of the last row, which
nobody reads; the first time too, so that what a forward gives does not depend on what came before it. (Rows
do not depend on each other; the sums of another shape may round differently.) Above `MAX_TOKENS` a forward is
bound by arithmetic and is run as it is. Where recording fails (a kernel that waits for the host), nothing is
recorded from then on, and this is logged once.

Forwards of block-wise decoding with a cache (`use_cache`) have a shape of their own for each number of
columns: one of the dual cache, one a block of the prefix cache. The whole canvas, which fills the cache, is
such a forward too, and is replayed once a shorter one of its canvas has been recorded: it then writes into
the memory that this one reads (recorded.py).

Recordings and warm-ups are no forwards: `model.forwards` counts a forward once, however it was run.

The model may not change while it is wrapped: a graph reads the weights where they were when it was recorded.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllmq.diffusion.predict import States, WholeStates, states_of
from dllmq.faults import is_out_of_memory
from dllmq.models.kv import KVCache
from dllmq.models.recorded import (
    ROWS,
    Capture,
    Memory,
    PaddedCache,
    Recorded,
    RecordedSlice,
    pad_rows,
    record,
    round_up,
)

log = logging.getLogger(__name__)
MAX_TOKENS = 4096  # rows x columns
MAX_GRAPHS = 16  # the one used longest ago makes room; a prefix cache has one a block (8), and the canvas
MAX_CACHED = 2**14  # rows x columns of all caches that recordings hold


class GraphedModel:
    """A `MaskPredictor` that replays the forwards of `model`.

    Args:
        model: a `BlockStack`.
        capture: records a function without arguments; CUDA graphs unless a test says otherwise.
    """

    def __init__(self, model: Any, capture: Capture | None = None) -> None:
        self.model, self.config = model, model.config
        self._capture = capture or CudaCapture(model.device)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recorded: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._failed = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    def head(self, h: Tensor) -> Tensor:
        return self.model.head(h)

    def __getattr__(self, name: str) -> Any:
        """What only some callers use of a model (its embedding)."""
        return getattr(self.model, name)

    def hidden_states(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B L d"]:
        if not _is_small(input_ids):
            return self.model.hidden_states(input_ids, attention_mask)
        return self._padded(pad_rows(input_ids), attention_mask)[: len(input_ids)]

    def states(self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None) -> States:
        """Of all columns where forwards are replayed: their shape is fixed."""
        if not _is_small(input_ids):
            return states_of(self.model, input_ids, attention_mask)
        return WholeStates(self.hidden_states(input_ids, attention_mask))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.hidden_states(input_ids, attention_mask))

    def start_cache(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "B L d"], PaddedCache]:
        """As the model's; a long canvas is run with the rows it has."""
        rows, columns = input_ids.shape
        if not _is_small(input_ids):
            h, cache = self.model.start_cache(input_ids, attention_mask)
            return h, PaddedCache.of(cache, rows)
        mask = None if attention_mask is None else pad_rows(attention_mask)
        cache = self.model.empty_cache(columns, mask)
        return self._sliced(pad_rows(input_ids), 0, cache)[:rows], PaddedCache(cache, rows)

    def use_cache(
        self, input_ids: Int[Tensor, "B n"], start: int, cache: PaddedCache
    ) -> Float[Tensor, "B n d"]:
        if not _is_small(input_ids):
            return self.model.use_cache(pad_rows(input_ids), start, cache.cache)[: len(input_ids)]
        return self._sliced(pad_rows(input_ids), start, cache.cache)[: len(input_ids)]

    @torch.no_grad()
    def _padded(self, input_ids: Int[Tensor, "R L"], attention_mask: Tensor | None) -> Float[Tensor, "R L d"]:
        """The hidden states of a canvas whose rows are padded already."""
        rows, columns = input_ids.shape
        mask = None if attention_mask is None else pad_rows(attention_mask)
        context = self.model.context(columns, mask)
        with self._one_forward():
            recorded: Recorded | None = self._find(
                ("full", rows, columns, context.bias is not None),
                lambda: record(self.model.run_blocks, input_ids, context, self._capture),
            )
            run = recorded or self.model.run_blocks
            return run(input_ids, context)

    @torch.no_grad()
    def _sliced(self, input_ids: Int[Tensor, "R n"], start: int, cache: KVCache) -> Float[Tensor, "R n d"]:
        """The hidden states of some columns, whose keys and values go into the cache."""
        canvas, has_bias = cache.context.sin.shape[-2], cache.context.bias is not None
        memory = self._memory(len(input_ids), canvas)
        with self._one_forward():
            recorded: RecordedSlice | None = None
            if memory is not None or not cache.is_empty:
                recorded = self._find(
                    ("slice", *input_ids.shape, canvas, has_bias),
                    lambda: self._record_slice(input_ids, start, cache, memory),
                )
            run = recorded or self.model.use_cache
            return run(input_ids, start, cache)

    def _record_slice(
        self, input_ids: Int[Tensor, "R n"], start: int, cache: KVCache, memory: Memory | None
    ) -> RecordedSlice:
        """Warming up it writes the keys and values that the first replay writes again."""
        at = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        if memory is None:
            self._make_room(len(input_ids), cache.context.sin.shape[-2])
        held = memory or Memory(cache)
        held.hold(cache)

        def run(ids: Tensor, context: Any) -> Tensor:
            return self.model.run_cached(ids, context, held.layers, at)

        context = cache.context.columns(start, start + len(at))
        return RecordedSlice(record(run, input_ids, context, self._capture), at, held)

    def _make_room(self, rows: int, canvas: int) -> None:
        """Recordings that hold other caches go, those used longest ago first."""
        sizes: list[Any] = [key[1::2] for key in self._recorded if key[0] == "slice"]
        kept = list(dict.fromkeys(sizes))
        while kept and sum(r * c for r, c in kept) + rows * canvas > MAX_CACHED:
            oldest = kept.pop(0)
            for key in [k for k in self._recorded if k[0] == "slice" and k[1::2] == oldest]:
                del self._recorded[key]

    def forget(self) -> None:
        """Gives back what recordings hold; shapes are recorded anew when they come again."""
        self._recorded.clear()
        self._seen.clear()
        if isinstance(self._capture, CudaCapture):
            self._capture = CudaCapture(self.model.device)  # a pool of graphs that are gone is useless

    def _memory(self, rows: int, canvas: int) -> Memory | None:
        """What recordings of this many rows and columns of a canvas read already."""
        slices = (r for key, r in self._recorded.items() if key[0] == "slice" and key[1::2] == (rows, canvas))
        found = next(slices, None)
        return None if found is None else found.memory

    def _find(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """The recording of a shape that comes for the second time; None: run it as it is."""
        if key not in self._recorded and self._seen[key] and not self._failed:
            self._record(key, make)
        self._seen[key] += 1
        if key in self._recorded:
            self._recorded.move_to_end(key)
        return self._recorded.get(key)

    def _record(self, key: tuple[object, ...], make: Callable[[], Any]) -> None:
        if len(self._recorded) == MAX_GRAPHS:
            self._recorded.popitem(last=False)
        try:
            self._recorded[key] = make()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise  # the batch is halved, as without graphs
            self._failed = True
            first = str(error).partition("\n")[0]
            log.warning("forwards cannot be recorded as CUDA graphs, they run kernel by kernel: %s", first)

    @contextmanager
    def _one_forward(self) -> Iterator[None]:
        """Whatever runs inside, the model counts it as one."""
        before = self.model.forwards
        try:
            yield
        finally:
            self.model.forwards = before + 1


class CudaCapture:
    """Records on a device; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """The output's tensor and what computes it anew.

        Raises:
            RuntimeError: a kernel that cannot be recorded.
        """
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and workspaces made outside the recording
                function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = function()
        self._pool = self._pool or graph.pool()
        return output, graph.replay


def graphed(model: Any) -> Any:
    """The model with recorded forwards, where this pays: on CUDA, unless its blocks are streamed."""
    blocks = getattr(model, "blocks", None)
    here = blocks is not None and not any(p.is_meta for p in blocks.parameters())
    return GraphedModel(model) if model.device.type == "cuda" and here else model


def _is_small(input_ids: Int[Tensor, "B L"]) -> bool:
    """Whether a forward is short enough to be replayed."""
    rows, columns = input_ids.shape
    return rows <= ROWS[-1] and round_up(rows) * columns <= MAX_TOKENS
