"""Dream (arXiv 2508.15487), natively: Qwen2 with full attention, trained as a masked diffusion model.

    x += o_proj(attention(input_layernorm(x)))
    x += down_proj(silu(gate_proj(h)) * up_proj(h)),  h = post_attention_layernorm(x)

Biases on q, k and v only; grouped-query attention; RoPE over the whole head (half-split layout). The
parameter names are the published state dict's: `model.layers.{i}.self_attn.q_proj.weight` and so on.

Dream was initialised from an autoregressive model and keeps its shift: logits at column i predict token
i + 1. `model(...)` returns them as they are; diffusion/predict.py aligns them for models whose config has
`shifted_logits`.

Precision follows the published code in bf16: RMSNorm in fp32, cast, then times the weight in bf16; RoPE in
the activations' dtype, tables included; logits in the weights' dtype. Positions count the tokens of a row
from 0, pads left out, so left padding changes nothing. Difference: pads are hidden as keys, but a pad as a
query sees the row's tokens (published: nothing); nobody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dllmq.kernels.cpu_linear import linear
from dllmq.models.attention import AttentionProduct
from dllmq.models.base import (
    BlockContext,
    BlockStack,
    GroupRow,
    Topology,
    check_types,
    columns,
    padding_bias,
)
from dllmq.models.linear import Linear
from dllmq.models.llada import RMSNorm, RotaryBlock, rope_tables

TOPOLOGY = Topology(
    groups=(
        GroupRow(
            "qkv",
            ("q_proj", "k_proj", "v_proj"),
            absorber="input_layernorm",
            inspect="attention",
            clip=("v_proj",),
        ),
        GroupRow("attn_out", ("o_proj",), absorber="v_proj", inspect=None, clip=("o_proj",)),
        GroupRow(
            "gate_up",
            ("gate_proj", "up_proj"),
            absorber="post_attention_layernorm",
            inspect="mlp",
            clip=("gate_proj", "up_proj"),
        ),
        GroupRow("down", ("down_proj",), absorber="up_proj", inspect=None, clip=("down_proj",)),
    ),
    product_before="attn_out",
    head="lm_head",
    embedding="model.embed_tokens",
)

# Fields of the published config.json that select code paths no published Dream checkpoint uses.
_ONLY = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}
_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "mask_token_id",
    "eos_token_id",
    "rope_theta",
)
_PUBLISHED_VOCABULARY, _IM_END = 152064, 151645  # <|im_end|> ends a turn; the published config omits it


@dataclass(frozen=True)
class DreamConfig:
    """config.json under the published field names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    rope_theta: float
    num_key_value_heads: int | None = None
    pad_token_id: int | None = None
    eot_token_id: int | None = None
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    shifted_logits: ClassVar[bool] = True  # logits at column i predict token i + 1

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> DreamConfig:
        """Reads a published config.json.

        Raises:
            ValueError: a missing field, or a field whose value selects something Dream checkpoints do not
                use.
        """
        for name, allowed in _ONLY.items():
            if raw.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"config.json has {name} = {raw[name]!r}; Dream checkpoints are supported with "
                    f"{name} = {allowed[0]!r} only."
                )
        known = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        known = check_types(cls, known)
        missing = [name for name in _NEEDED if name not in known]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}, which a Dream model needs: use the published "
                "config.json."
            )
        if known["vocab_size"] == _PUBLISHED_VOCABULARY:
            known.setdefault("eot_token_id", _IM_END)
        config = cls(**known)
        _check_sizes(config)
        return config

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def logit_size(self) -> int:
        """E, the number of logit columns."""
        return self.vocab_size

    @property
    def max_sequence_length(self) -> int:
        """Tokens a canvas may have, under LLaDA's name for it."""
        return self.max_position_embeddings


def _check_sizes(c: DreamConfig) -> None:
    if c.hidden_size % (2 * c.num_attention_heads) or c.num_attention_heads % c.kv_heads:
        raise ValueError(
            f"config.json has hidden_size = {c.hidden_size}, num_attention_heads = {c.num_attention_heads}, "
            f"num_key_value_heads = {c.kv_heads}; hidden_size / num_attention_heads must be an even number "
            "and key/value heads must divide heads."
        )
    if c.mask_token_id >= c.vocab_size:
        raise ValueError(
            f"config.json has mask_token_id = {c.mask_token_id}, but the embedding has {c.vocab_size} rows; "
            "it must be one of their ids."
        )


class DreamMLP(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, bias=False)
        self.up_proj = Linear(d, f, bias=False)
        self.down_proj = Linear(f, d, bias=False)

    def forward(self, h: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        return self.down_proj(F.silu(self.gate_proj(h)).mul_(self.up_proj(h)))


_CHILD_OF = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)


class DreamBlock(RotaryBlock):
    """The published names put the linears into two children; `block.q_proj` reads and replaces them there."""

    output = "o_proj"

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d, kv = config.hidden_size, config.kv_heads * config.head_dim
        self.config = config
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": Linear(d, d, bias=True),
                "k_proj": Linear(d, kv, bias=True),
                "v_proj": Linear(d, kv, bias=True),
                "o_proj": Linear(d, d, bias=False),
            }
        )
        self.mlp = DreamMLP(config)  # type: ignore[misc]  # nn.Module makes it a child
        self.product = AttentionProduct()

    def __getattr__(self, name: str) -> Any:
        child = _CHILD_OF.get(name)
        return super().__getattr__(name) if child is None else getattr(self._modules[child], name)

    def __setattr__(self, name: str, value: Any) -> None:
        child = _CHILD_OF.get(name)
        if child is None:
            super().__setattr__(name, value)
        else:
            setattr(self._modules[child], name, value)

    def forward(
        self, x: Float[Tensor, "B L d"], ctx: BlockContext, at: slice | None = None
    ) -> Float[Tensor, "B c d"]:
        x = self.attention(self.input_layernorm(x), ctx, at).add_(columns(x, at))
        return self.mlp(self.post_attention_layernorm(x)).add_(x)

    @property
    def mlp(self) -> DreamMLP:  # a child, where other blocks have a method
        return self._modules["mlp"]  # type: ignore[return-value]


class Dream(BlockStack):
    """The predictor of Dream, built from a config; `dllmq.models.load_model` reads checkpoints.

    Its logits are unshifted: column i predicts token i + 1.
    """

    topology = TOPOLOGY

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(DreamBlock(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model["layers"]  # type: ignore[return-value]

    def final_norm(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        return self.model["norm"](x)

    def head(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... E"]:
        tied = self.config.tie_word_embeddings
        return linear(h, (self.model["embed_tokens"] if tied else self.lm_head).weight)  # type: ignore[arg-type]

    def context(self, length: int, attention_mask: Tensor | None = None) -> BlockContext:
        """What all blocks share in a forward over `length` columns; with pads, RoPE tables by row."""
        sin, cos = rope_tables(length, self.config.head_dim, self.config.rope_theta, self.device)
        bias = padding_bias(attention_mask, self.dtype)
        if attention_mask is None or bias is None:
            return BlockContext(None, sin, cos)
        at = positions(attention_mask)
        return BlockContext(bias, sin[at][:, None], cos[at][:, None])  # [B, 1, L, head_dim]


def positions(attention_mask: Tensor) -> Int[Tensor, "B L"]:
    """The position of each token in its row, counted without pads; 0 at pads."""
    return ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)


ARCHITECTURES = {"DreamModel": (DreamConfig, Dream)}
