"""A deterministic two-layer mask predictor for the tests: bidirectional, mask-aware, relative positions."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCAB, EOS, EOT, MASK = 23, 20, 21, 22


class TinyModel(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, eot_token_id=EOT)
        g = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))

        self.embedding = weight(VOCAB, width)
        with torch.no_grad():
            self.embedding[MASK] *= 0.1  # what a mask becomes depends on its neighbours
        self.qkv = nn.ParameterList(weight(3, width, width) for _ in range(2))
        self.mlp = nn.ParameterList(weight(width, width) for _ in range(2))
        self.unembedding = weight(width, VOCAB)
        self.calls = 0
        self.rows_read = 0

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        width = self.embedding.shape[1]
        h = self.embedding[input_ids]
        at = torch.arange(input_ids.shape[1])
        distance = (at[None, :] - at[:, None]).to(h.dtype)
        bias = 4 * torch.sin(1.7 * distance) - 0.3 * distance.abs()  # direction matters
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = (h @ w / width**0.5 for w in qkv)
            scores = q @ k.transpose(1, 2) / width**0.5 + bias
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(h.dtype).min)
            h = h + 2 * scores.softmax(-1) @ v
            h = h + torch.tanh(h @ mlp / width**0.5)
            h = h / h.pow(2).mean(-1, keepdim=True).sqrt()
        return h

    def head(self, h: Tensor) -> Tensor:
        self.rows_read += h.shape[:-1].numel()
        return 0.7 * h @ self.unembedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.hidden_states(input_ids, attention_mask))


class FixedLogits(TinyModel):
    """The same given logits at every position."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.dtype)
        self.fixed = logits

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.fixed.new_zeros(*input_ids.shape, 1)

    def head(self, h: Tensor) -> Tensor:
        return self.fixed.expand(*h.shape[:-1], len(self.fixed))


class UniformModel(FixedLogits):
    """Every logit is equal everywhere."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(torch.zeros(VOCAB, dtype=dtype))


def prompts(batch: int = 3, length: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(0, EOS, (batch, length), generator=torch.Generator().manual_seed(seed))
