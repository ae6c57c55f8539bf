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

The model may not change while it is wrapped: a graph reads the weights where they were when it was recorded.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dllmq.diffusion.predict import States, WholeStates, states_of
from dllmq.models.base import BlockContext

log = logging.getLogger(__name__)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_TOKENS = 4096  # rows x columns
MAX_GRAPHS = 8  # the one used longest ago makes room

# A function without arguments -> the tensor it returns, and what computes this tensor anew.
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


@dataclass(frozen=True)
class Recorded:
    """A recorded forward: its own inputs, its output, and what runs it."""

    input_ids: Int[Tensor, "B L"]
    context: BlockContext
    output: Float[Tensor, "B L d"]
    replay: Callable[[], None]

    def __call__(self, input_ids: Int[Tensor, "B L"], context: BlockContext) -> Float[Tensor, "B L d"]:
        """The hidden states, in memory that the next replay leaves alone."""
        self.input_ids.copy_(input_ids)
        for own, given in zip(self.context[:3], context[:3], strict=True):  # bias, sin, cos
            if own is not None and given is not None:
                own.copy_(given)
        self.replay()
        return self.output.clone()


class GraphedModel:
    """A `MaskPredictor` that replays the forwards of `model`.

    Args:
        model: a `BlockStack`.
        capture: records a function without arguments; CUDA graphs unless a test says otherwise.
    """

    def __init__(self, model: Any, capture: Capture | None = None) -> None:
        self.model, self.config = model, model.config
        self._capture = capture or CudaCapture(model.device)
        self._seen: Counter[tuple[int, int, bool]] = Counter()
        self._recorded: OrderedDict[tuple[int, int, bool], Recorded] = OrderedDict()
        self._failed = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    def head(self, h: Tensor) -> Tensor:
        return self.model.head(h)

    def __getattr__(self, name: str) -> Any:
        """What only some callers use of a model (its embedding, its cache of keys and values)."""
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

    @torch.no_grad()
    def _padded(self, input_ids: Int[Tensor, "R L"], attention_mask: Tensor | None) -> Float[Tensor, "R L d"]:
        """The hidden states of a canvas whose rows are padded already."""
        rows, columns = input_ids.shape
        mask = None if attention_mask is None else pad_rows(attention_mask)
        context = self.model.context(columns, mask)
        key = (rows, columns, context.bias is not None)
        recorded = self._recorded.get(key)
        if recorded is None and self._seen[key] and not self._failed:
            recorded = self._record(key, input_ids, context)
        self._seen[key] += 1
        if recorded is None:
            return self.model.run_blocks(input_ids, context)
        self._recorded.move_to_end(key)
        return recorded(input_ids, context)

    def _record(
        self, key: tuple[int, int, bool], input_ids: Tensor, context: BlockContext
    ) -> Recorded | None:
        own_ids = input_ids.clone()
        bias = None if context.bias is None else context.bias.clone()
        own = context._replace(bias=bias, sin=context.sin.clone(), cos=context.cos.clone())
        if len(self._recorded) == MAX_GRAPHS:
            self._recorded.popitem(last=False)
        try:
            output, replay = self._capture(lambda: self.model.run_blocks(own_ids, own))
        except torch.OutOfMemoryError:
            raise  # the batch is halved, as without graphs
        except RuntimeError as error:
            self._failed = True
            first = str(error).partition("\n")[0]
            log.warning("forwards cannot be recorded as CUDA graphs, they run kernel by kernel: %s", first)
            return None
        self._recorded[key] = Recorded(own_ids, own, output, replay)
        return self._recorded[key]


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


def round_up(rows: int) -> int:
    """The next of ROWS."""
    return next(n for n in ROWS if n >= rows)


def pad_rows(x: Shaped[Tensor, "B L"]) -> Shaped[Tensor, "R L"]:
    """x with copies of its last row up to the next of ROWS."""
    missing = round_up(len(x)) - len(x)
    return torch.cat([x, x[-1:].expand(missing, -1)]) if missing else x
