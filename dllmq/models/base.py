"""What the rest of dllmq knows about a model: a mask predictor made of blocks, and a topology table.

A diffusion LM is a *mask predictor*: one bidirectional forward maps a partly masked sequence x_t to logits
for every position. Quantization sees it as a stack of blocks, each with four groups of linears in execution
order ({q, k, v}, attention output, {gate, up}, down). Which linears share an input, which op before them can
absorb a
scale and which module a method inspects is data: `Topology`, one table per architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllmq.diffusion.predict import States, WholeStates
from dllmq.models.attention import AttentionProduct
from dllmq.models.kv import KeysValues, KVCache
from dllmq.models.linear import QuantLinear


@dataclass(frozen=True)
class GroupRow:
    """One row of a topology table: linears of a block that read the same input.

    Attributes:
        name: "qkv", "attn_out", "gate_up" or "down".
        linears: attribute names in the block, in execution order.
        absorber: attribute name of the op whose output is the group's input up to a channel-wise map, so that
            x -> x / s can be moved into its weight: a norm (weight / s) or a linear (output rows / s).
        inspect: the block's method that AWQ's loss looks at ("attention", "mlp"), None for the linear itself.
        clip: linears whose weights AWQ may clip (not q and k: their product decides the attention pattern).
    """

    name: str
    linears: tuple[str, ...]
    absorber: str
    inspect: str | None
    clip: tuple[str, ...]


@dataclass(frozen=True)
class Topology:
    """Where things are in an architecture.

    Attributes:
        groups: rows in execution order.
        product_before: name of the group whose input is the attention product P V, so the scale of V is
            settled just before that group.
        head: dotted name of the LM head; embedding: of the token embedding.
    """

    groups: tuple[GroupRow, ...]
    product_before: str
    head: str
    embedding: str


class BlockContext(NamedTuple):
    """What the blocks of one forward share: key-padding bias (None without pads) and RoPE tables.

    `past` is the block's own, in a forward that keeps keys and values (`start_cache`, `use_cache`): the
    tables are then those of the forward's columns, the bias that of all.
    """

    bias: Float[Tensor, "B 1 1 L"] | None
    sin: Float[Tensor, "L head_dim"]
    cos: Float[Tensor, "L head_dim"]
    past: KeysValues | None = None

    def keys_values(self, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """What the columns of this forward attend to: their own keys and values, or with those kept."""
        return (K, V) if self.past is None else self.past.replace(K, V)

    def columns(self, start: int, stop: int) -> BlockContext:
        """For a forward over these columns only."""
        return self._replace(sin=self.sin[..., start:stop, :], cos=self.cos[..., start:stop, :])

    def take(self, rows: Bool[Tensor, " B"] | Int[Tensor, " R"]) -> BlockContext:
        """For these rows; tables with a row dimension have one per row."""
        sin, cos = (table[rows] if table.dim() == 4 else table for table in (self.sin, self.cos))
        return self._replace(bias=None if self.bias is None else self.bias[rows], sin=sin, cos=cos)


class Block(nn.Module, ABC):
    """One transformer block. Subclasses name their linears as the published state dict does."""

    product: AttentionProduct

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B L d"], ctx: BlockContext, at: slice | None = None
    ) -> Float[Tensor, "B c d"]:
        """The residual stream after the block: of all columns, or of those in `at`."""

    @abstractmethod
    def attention(
        self, h: Float[Tensor, "B L d"], ctx: BlockContext, at: slice | None = None
    ) -> Float[Tensor, "B c d"]:
        """The attention sub-layer on the already normalized input h, output projection included."""

    @abstractmethod
    def mlp(self, h: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        """The MLP sub-layer on the already normalized input h."""


@runtime_checkable
class MaskPredictor(Protocol):
    """The contract of a loaded model; `load_model` returns one."""

    config: Any  # mask_token_id, eos_token_id, ... as published
    topology: Topology
    blocks: nn.ModuleList

    def __call__(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B L E"]: ...
    def hidden_states(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B L d"]: ...
    def head(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... E"]: ...
    def embed(self, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]: ...
    def context(self, length: int, attention_mask: Tensor | None = None) -> BlockContext: ...


class BlockStack(nn.Module, ABC):
    """What the architectures share of a mask predictor: embedding, blocks, final norm, head."""

    config: Any
    topology: Topology
    forwards: int = 0  # calls of the transformer so far, replays of recorded ones among them (graphs.py)

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """In execution order."""

    @abstractmethod
    def final_norm(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        """The norm between the last block and the head."""

    @abstractmethod
    def head(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... E"]:
        """Logits of normalized hidden states."""

    @abstractmethod
    def context(self, length: int, attention_mask: Tensor | None = None) -> BlockContext:
        """What all blocks share in a forward over `length` columns."""

    @property
    def embedding(self) -> nn.Embedding:
        return self.get_submodule(self.topology.embedding)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B L E"]:
        """Raw logits of every column; `attention_mask` [B, L] is 0 at pads."""
        return self.head(self.hidden_states(input_ids, attention_mask))

    def hidden_states(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B L d"]:
        """Output of the final norm, so that the head can run at chosen columns only."""
        return self.run_blocks(input_ids, self.context(input_ids.shape[1], attention_mask))

    def run_blocks(self, input_ids: Int[Tensor, "B L"], ctx: BlockContext) -> Float[Tensor, "B L d"]:
        """`hidden_states` in a given context."""
        self.forwards += 1
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, ctx)
        return self.final_norm(x)

    def states(self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None) -> States:
        """`hidden_states` by windows: the last block computes the outputs of the columns that are read.

        The blocks of a streamed model are only there while it iterates over them: all are run.
        """
        last = self.blocks[-1]
        if any(p.is_meta for p in last.parameters()):
            return WholeStates(self.hidden_states(input_ids, attention_mask))
        self.forwards += 1
        x, ctx = self.embed(input_ids), self.context(input_ids.shape[1], attention_mask)
        for block in list(self.blocks)[:-1]:
            x = block(x, ctx)
        return _OpenStates(self, x, ctx)

    def start_cache(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "B L d"], KVCache]:
        """`hidden_states` of the whole canvas, and the keys and values it computed."""
        cache = self.empty_cache(input_ids.shape[1], attention_mask)
        return self.use_cache(input_ids, 0, cache), cache

    def empty_cache(self, length: int, attention_mask: Tensor | None = None) -> KVCache:
        """Of a canvas of `length` columns; a forward over all of them fills it."""
        return KVCache([KeysValues() for _ in range(len(self.blocks))], self.context(length, attention_mask))

    def use_cache(self, input_ids: Int[Tensor, "B n"], start: int, cache: KVCache) -> Float[Tensor, "B n d"]:
        """`hidden_states` of the canvas's columns from `start` on, the others' keys and values as cached.

        The columns' own keys and values replace those in the cache.
        """
        stop = start + input_ids.shape[1]
        return self.run_cached(
            input_ids, cache.context.columns(start, stop), cache.layers, slice(start, stop)
        )

    def run_cached(
        self,
        input_ids: Int[Tensor, "B n"],
        ctx: BlockContext,
        layers: list[KeysValues],
        at: slice | Int[Tensor, " n"],
    ) -> Float[Tensor, "B n d"]:
        """`use_cache` in a given context, of the columns `at`."""
        self.forwards += 1
        x = self.embed(input_ids)
        for block, past in zip(self.blocks, layers, strict=True):
            past.at = at
            x = block(x, ctx._replace(past=past))
        return self.final_norm(x)

    def embed(self, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
        return self.embedding(input_ids)


@dataclass(frozen=True)
class _OpenStates:
    """What the last block reads."""

    model: BlockStack
    x: Float[Tensor, "B L d"]
    ctx: BlockContext

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def window(self, start: int, stop: int) -> Float[Tensor, "B c d"]:
        last: Any = self.model.blocks[-1]
        return self.model.final_norm(last(self.x, self.ctx, slice(start, stop)))


@dataclass(frozen=True)
class LinearGroup:
    """A group of linears as a method sees it: weights, and how to judge a change of them.

    Attributes:
        name: for messages and records, "blocks.3.qkv".
        weights: linear name -> W [O, I] in fp32.
        can_scale: whether an op before the group can absorb x -> x / s.
        inspect: (weights, X [B, L, I], valid [B, L] or None) -> output of the inspected module, computed with
            the given weights in the place of the group's own and X as the group's input.
        clip: linears AWQ may clip.
        inspects_itself: the inspected module is the linears alone, so its output is linear in their weights.
    """

    name: str
    weights: dict[str, Float[Tensor, "O I"]]
    can_scale: bool
    inspect: Callable[[dict[str, Tensor], Tensor, Tensor | None], Tensor]
    clip: frozenset[str]
    inspects_itself: bool = False


@contextmanager
def swapped_weights(block: Block, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within the context, the block's named linears hold the given weights (cast to their dtype)."""
    linears = {name: getattr(block, name) for name in weights}
    kept = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, W in weights.items():
            linears[name].weight.data = W.to(kept[name])
        yield
    finally:
        for name, W in kept.items():
            linears[name].weight.data = W


def linear_group(model: MaskPredictor, index: int, row: GroupRow) -> LinearGroup:
    """The group of topology row `row` in block `index` of the model."""
    block: Any = model.blocks[index]

    def inspect(weights: dict[str, Tensor], X: Tensor, valid: Tensor | None) -> Tensor:
        X = X.to(getattr(block, row.linears[0]).weight.dtype)
        with swapped_weights(block, weights):
            if row.inspect == "attention":
                return block.attention(X, model.context(X.shape[1], valid))
            if row.inspect == "mlp":
                return block.mlp(X)
            return torch.cat([getattr(block, name)(X) for name in row.linears], dim=-1)

    return LinearGroup(
        name=f"blocks.{index}.{row.name}",
        weights={name: getattr(block, name).weight.detach().float() for name in row.linears},
        can_scale=_can_absorb(block, row),
        inspect=inspect,
        clip=frozenset(row.clip),
        inspects_itself=row.inspect is None,
    )


def _can_absorb(block: Block, row: GroupRow) -> bool:
    """Whether the op before the group can divide its output by a scale.

    A norm always can. A linear can if its outputs are the group's inputs one to one (not with grouped
    values), no quantizer sits between the two, and its own grid has scales by row.
    """
    absorber = getattr(block, row.absorber)
    if absorber.weight.dim() == 1:
        return True
    same_width = absorber.weight.shape[0] == getattr(block, row.linears[0]).weight.shape[1]
    free_path = row.name != "attn_out" or block.product.passes_values
    by_row = not isinstance(absorber, QuantLinear) or absorber.grid.group_size != 0
    return same_width and free_path and by_row


@torch.no_grad()
def absorb_scale(block: Block, row: GroupRow, s: Float[Tensor, " I"]) -> None:
    """Divides the group's input by s, by changing the op before it: function-preserving once W -> W s."""
    absorber = getattr(block, row.absorber)
    if isinstance(absorber, QuantLinear):
        absorber.scale_rows(1 / s)
        return
    weight = absorber.weight.data
    by_output = s if weight.dim() == 1 else s[:, None]
    absorber.weight.data = (weight.float() / by_output).to(weight.dtype)
    if getattr(absorber, "bias", None) is not None:
        absorber.bias.data = (absorber.bias.data.float() / s).to(absorber.bias.dtype)


def columns(h: Float[Tensor, "*rows L d"], at: slice | None) -> Float[Tensor, "*rows c d"]:
    """h at some columns; h itself, the same tensor, for None."""
    return h if at is None else h[..., at, :]


def padding_bias(attention_mask: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "B 1 1 L"] | None:
    """Additive bias over keys: finfo.min at pads for every query, None where nothing is padded."""
    if attention_mask is None:
        return None
    keep: Bool[Tensor, "B L"] = attention_mask.bool()
    if bool(keep.all()):
        return None
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return bias.masked_fill_(~keep, torch.finfo(dtype).min)[:, None, None, :]


def shown(value: object, limit: int = 80) -> str:
    """A value of a file as a message may show it: short, without control characters."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


_MOST, _MOST_LAYERS = 2**28, 2**12


def check_types(config_class: type, known: dict[str, Any]) -> dict[str, Any]:
    """The values of config.json, whole numbers of float fields as floats.

    Refused are values of another type, sign or size than the fields of `config_class`.

    Ids may be 0, other integers are at least 1. What is allocated or looped over has a largest value far
    above any model's, so that a damaged or hostile file is refused instead of filling memory.

    Raises:
        ValueError: naming config.json, the field and what it must be.
    """
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(config_class)}
    for name, value in known.items():
        if kinds[name] == "bool":
            good, needed = isinstance(value, bool), "true or false"
        else:
            accepted = int if kinds[name] == "int" else (int, float)
            least = 0 if name.endswith("_id") else 1 if kinds[name] == "int" else 0
            most = _MOST_LAYERS if name.endswith("_layers") else _MOST if kinds[name] == "int" else 1e12
            good = isinstance(value, accepted) and not isinstance(value, bool) and least <= value <= most
            limit = f"<= {most}" if isinstance(value, accepted) and value > most else f">= {least}"
            needed = f"{'an integer' if kinds[name] == 'int' else 'a number'} {limit}"
        if not good:
            raise ValueError(f"config.json has {name} = {value!r:.80}; it must be {needed}.")
    return {name: float(value) if kinds[name] == "float" else value for name, value in known.items()}
