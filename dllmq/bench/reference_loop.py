"""The plain loop that generation is compared with: ML-GSAI/LLaDA `generate.py`, written down step by step.

Every step runs the transformer and the LM head over the whole canvas, takes a softmax over the whole
vocabulary at every position, and commits the most confident masks of the current block, row by row. Nothing
is skipped and no row leaves. Logits are of the model's dtype, and so is the softmax (the code published since
October 2025); `confidence` = float64 is what its first version and Fast-dLLM do. Noise is drawn in float64.

One thing is settled that the published code leaves to `torch.topk`: of equal confidences the leftmost counts
first, as in dllmq.diffusion. (A trained model's confidences are often exactly 1.)

Legend: B rows, L = P + gen_length columns, E logits, k tokens to commit.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dllmq.diffusion import Generation, SamplerConfig


@torch.no_grad()
def plain_generate(
    model: Any,
    prompt_ids: Int[Tensor, "B P"],
    config: SamplerConfig,
    attention_mask: Shaped[Tensor, "B P"] | None = None,
    confidence: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Denoises to the end, `config.steps` forwards.

    Args:
        model: `model(x, mask)` -> logits [B, L, E].
        config: low_confidence remasking without guidance.
        confidence: dtype of the softmax; None: the logits'.

    Raises:
        ValueError: settings that the plain loop does not have.
    """
    if config.remasking != "low_confidence" or config.cfg_scale:
        raise ValueError("the plain loop has remasking=low_confidence and cfg_scale=0 only.")
    mask_id, P = model.config.mask_token_id, prompt_ids.shape[1]
    x = torch.nn.functional.pad(prompt_ids, (0, config.gen_length), value=mask_id)
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, config.gen_length), value=1)
    for block in range(config.num_blocks):
        start, end = (P + i * config.block_length for i in (block, block + 1))
        counts = transfer_counts((x[:, start:end] == mask_id).sum(1), config.steps_per_block)
        for step in range(config.steps_per_block):
            masked = x == mask_id
            logits = model(x, attention_mask)
            x0 = gumbel(logits, config.temperature, generator).argmax(-1)
            p = torch.softmax(logits if confidence is None else logits.to(confidence), dim=-1)
            key = p.gather(-1, x0[..., None])[..., 0].masked_fill(~masked, -torch.inf)
            key[:, end:] = -torch.inf
            for row in range(len(x)):
                best = key[row].argsort(descending=True, stable=True)[: int(counts[row, step])]
                x[row, best] = x0[row, best]
    return Generation(x, config.steps)


def transfer_counts(masks: Int[Tensor, " B"], steps: int) -> Int[Tensor, "B steps"]:
    """Tokens to commit in each step of a block: masks / steps, the first ones take one more."""
    base, rest = masks // steps, masks % steps
    return base[:, None] + (torch.arange(steps, device=masks.device) < rest[:, None])


def gumbel(
    logits: Float[Tensor, "B L E"], temperature: float, generator: torch.Generator | None
) -> Float[Tensor, "B L E"]:
    """exp(logits) / (-log u)^T in float64, whose argmax samples at temperature T; the logits at T = 0."""
    if temperature == 0:
        return logits
    u = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device=logits.device)
    return logits.double().exp() / (-torch.log(u)) ** temperature
