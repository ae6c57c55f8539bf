"""A random Dream of a few thousand parameters."""

import torch

from dllmq.models.dream import Dream, DreamConfig


def tiny_dream(mask_token_id: int = 39, eos_token_id: int = 38) -> Dream:
    """2 blocks, 40 tokens."""
    torch.manual_seed(0)
    config = DreamConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=48, vocab_size=40, mask_token_id=mask_token_id,
                         eos_token_id=eos_token_id, rope_theta=1e4)  # fmt: skip
    return Dream(config).requires_grad_(False).eval()
