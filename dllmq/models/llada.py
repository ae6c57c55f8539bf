"""LLaDA (arXiv 2502.09992), natively: a Llama-style bidirectional encoder with OLMo's names.

    x += attn_out(attention(attn_norm(x)))
    x += ff_out(silu(ff_proj(h)) * up_proj(h)),  h = ff_norm(x)

No biases, no dropout, full attention, RoPE over the whole head (half-split layout). The parameter names are
the published state dict's: `model.transformer.blocks.{i}.q_proj.weight` and so on, LM head
`model.transformer.ff_out` (the block's down-projection is called `ff_out` too; the topology table tells them
apart).

Precision follows the published code in bf16: RMSNorm in fp32, cast, then times the weight in bf16; RoPE in
fp32 when `rope_full_precision`; logits in the weights' dtype. The attention mask is key padding only and
honoured (the code published since October 2025; older snapshots ignore it): pads get finfo.min, positions are
absolute columns.

Elementwise products and sums write into the temporaries they are made from: the same bits, without the page
faults of new memory (4 - 10 % of a forward of 1,024 tokens at d = 2048 on the CPU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dllmq.kernels.cpu_linear import linear
from dllmq.models.attention import AttentionProduct
from dllmq.models.base import (
    Block,
    BlockContext,
    BlockStack,
    GroupRow,
    Topology,
    check_types,
    columns,
    padding_bias,
)
from dllmq.models.linear import Linear

TOPOLOGY = Topology(
    groups=(
        GroupRow(
            "qkv", ("q_proj", "k_proj", "v_proj"), absorber="attn_norm", inspect="attention", clip=("v_proj",)
        ),
        GroupRow("attn_out", ("attn_out",), absorber="v_proj", inspect=None, clip=("attn_out",)),
        GroupRow(
            "gate_up", ("ff_proj", "up_proj"), absorber="ff_norm", inspect="mlp", clip=("ff_proj", "up_proj")
        ),
        GroupRow("down", ("ff_out",), absorber="up_proj", inspect=None, clip=("ff_out",)),
    ),
    product_before="attn_out",
    head="model.transformer.ff_out",
    embedding="model.transformer.wte",
)

# Fields of the published config.json that select code paths no published LLaDA checkpoint uses.
_ONLY = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "block_group_size": (1,),
    "alibi": (False,),
    "rope": (True,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "attention_layer_norm": (False,),
    "multi_query_attention": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}


@dataclass(frozen=True)
class LLaDAConfig:
    """config.json under the published field names."""

    d_model: int
    n_layers: int
    n_heads: int
    mlp_hidden_size: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    n_kv_heads: int | None = None
    embedding_size: int | None = None
    pad_token_id: int | None = None
    eot_token_id: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rope_full_precision: bool = True
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LLaDAConfig:
        """Reads a published config.json.

        Raises:
            ValueError: a missing field, or a field whose value selects something LLaDA checkpoints do not
                use.
        """
        for name, allowed in _ONLY.items():
            if raw.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"config.json has {name} = {raw[name]!r}; LLaDA checkpoints are supported with "
                    f"{name} = {allowed[0]!r} only."
                )
        known = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        known = check_types(cls, known)
        if (
            "mlp_hidden_size" not in known
            and isinstance(raw.get("mlp_ratio"), int | float)
            and "d_model" in known
        ):
            known["mlp_hidden_size"] = int(min(raw["mlp_ratio"], 1e6) * known["d_model"])
            known = check_types(cls, known)
        needed = (
            "d_model",
            "n_layers",
            "n_heads",
            "mlp_hidden_size",
            "vocab_size",
            "mask_token_id",
            "eos_token_id",
        )
        missing = [name for name in needed if name not in known]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}, which a LLaDA model needs: use the published "
                "config.json."
            )
        if known.get("eot_token_id") is None and known["vocab_size"] == 126464:
            known["eot_token_id"] = (
                126348  # <|eot_id|> of the published tokenizer; the published config omits it
            )
        config = cls(**known)
        if config.d_model % (2 * config.n_heads) or config.n_heads % config.kv_heads:
            raise ValueError(
                f"config.json has d_model = {config.d_model}, n_heads = {config.n_heads}, n_kv_heads = "
                f"{config.kv_heads}; d_model / n_heads must be an even number and kv heads must divide heads."
            )
        if config.mask_token_id >= config.logit_size:
            raise ValueError(
                f"config.json has mask_token_id = {config.mask_token_id}, but the embedding has "
                f"{config.logit_size} rows; it must be one of their ids."
            )
        return config

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def logit_size(self) -> int:
        """E, the number of logit columns; ids >= vocab_size can be emitted, as in the published model."""
        return self.embedding_size or self.vocab_size


class RMSNorm(nn.Module):
    """x -> weight * (x / sqrt(mean x^2 + eps)), in fp32 up to the product.

    Attributes:
        is_moved: the quantizer of the linears behind it computes it (fused_norms.py); x is passed on.
    """

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps
        self.is_moved = False

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x if self.is_moved else self.normed(x)

    def normed(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What the norm computes, wherever it is."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype).mul_(self.weight)


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """sin and cos [L, head_dim] in fp32; inv_freq_i = theta^(-2i / head_dim), both halves alike."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inv_freq)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.sin(), angles.cos()


def rotate(x: Float[Tensor, "B h L c"], sin: Tensor, cos: Tensor, full_precision: bool) -> Tensor:
    """RoPE in the half-split layout: (x1, x2) -> (x1, x2) cos + (-x2, x1) sin."""
    y = x.float() if full_precision else x
    sin, cos = sin.to(y.dtype), cos.to(y.dtype)
    y1, y2 = y.chunk(2, dim=-1)
    return (y * cos).add_(torch.cat((-y2, y1), dim=-1).mul_(sin)).to(x.dtype)


class RotaryBlock(Block):
    """A block whose attention rotates q_proj's and k_proj's heads; LLaDA's and Dream's.

    Attributes:
        output: name of the output projection; full_rotation: RoPE in float32 whatever the dtype.
    """

    config: Any  # has head_dim
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    output: str
    full_rotation = False

    def project(
        self, h: Float[Tensor, "B L d"], ctx: BlockContext, at: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, heads, c, head_dim] and keys, and values, [B, kv heads, L, head_dim] each."""
        Q, K, V = (
            self._heads(part) for part in (self.q_proj(columns(h, at)), self.k_proj(h), self.v_proj(h))
        )
        sin, cos = columns(ctx.sin, at), columns(ctx.cos, at)
        return rotate(Q, sin, cos, self.full_rotation), rotate(K, ctx.sin, ctx.cos, self.full_rotation), V

    def attention(
        self, h: Float[Tensor, "B L d"], ctx: BlockContext, at: slice | None = None
    ) -> Float[Tensor, "B c d"]:
        Q, K, V = self.project(h, ctx, at)
        mixed = self.product(Q, *ctx.keys_values(K, V), ctx.bias)
        project_out: nn.Module = getattr(self, self.output)
        return project_out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "B L n"]) -> Float[Tensor, "B h L c"]:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class LLaDABlock(RotaryBlock):
    output = "attn_out"

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        d, f, kv = config.d_model, config.mlp_hidden_size, config.kv_heads * config.head_dim
        self.config, self.full_rotation = config, config.rope_full_precision
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, kv, bias=False)
        self.v_proj = Linear(d, kv, bias=False)
        self.attn_out = Linear(d, d, bias=False)
        self.ff_proj = Linear(d, f, bias=False)
        self.up_proj = Linear(d, f, bias=False)
        self.ff_out = Linear(f, d, bias=False)
        self.product = AttentionProduct()

    def forward(
        self, x: Float[Tensor, "B L d"], ctx: BlockContext, at: slice | None = None
    ) -> Float[Tensor, "B c d"]:
        x = self.attention(self.attn_norm(x), ctx, at).add_(columns(x, at))
        return self.mlp(self.ff_norm(x)).add_(x)

    def mlp(self, h: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        return self.ff_out(F.silu(self.ff_proj(h)).mul_(self.up_proj(h)))


class LLaDA(BlockStack):
    """The mask predictor p(x_0 | x_t), built from a config; `dllmq.models.load_model` reads checkpoints."""

    topology = TOPOLOGY

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        transformer = {
            "wte": nn.Embedding(config.logit_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            transformer["ff_out"] = Linear(config.d_model, config.logit_size, bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(transformer)})

    @property
    def transformer(self) -> nn.ModuleDict:
        return self.model["transformer"]  # type: ignore[return-value]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer["blocks"]  # type: ignore[return-value]

    def final_norm(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        return self.transformer["ln_f"](x)

    def head(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... E"]:
        weight = self.transformer["wte" if self.config.weight_tying else "ff_out"].weight
        return linear(h, weight)  # type: ignore[arg-type]

    def context(self, length: int, attention_mask: Tensor | None = None) -> BlockContext:
        """What all blocks share in a forward over `length` columns."""
        sin, cos = rope_tables(length, self.config.head_dim, self.config.rope_theta, self.device)
        return BlockContext(padding_bias(attention_mask, self.dtype), sin, cos)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, gain: float = 0.8) -> None:
        """Normal weights of std gain / sqrt(fan_in), embeddings of std 0.5.

        The two projections into the residual stream are divided by sqrt(2 n_layers).
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0)
                continue
            std = 0.5 if name.endswith("wte.weight") else gain / math.sqrt(p.shape[1])
            if ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            p.normal_(0, std, generator=generator)


ARCHITECTURES = {"LLaDAModelLM": (LLaDAConfig, LLaDA)}
