"""What the tests of the harness and of the tasks share: the embedded tokenizer and a tiny random LLaDA."""

from functools import partial

import pytest
import torch

import dllmq.mini.tokenizer
from dllmq.models.llada import LLaDA, LLaDAConfig


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded tokenizer, its words counted in fewer texts: seconds instead of half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dllmq.mini.tokenizer, "task_texts", partial(dllmq.mini.tokenizer.task_texts, n=400))
        return dllmq.mini.tokenizer.build_tokenizer(min_count=2)


@pytest.fixture(scope="session")
def model(tokenizer) -> LLaDA:
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=48,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        eot_token_id=tokenizer.convert_tokens_to_ids(dllmq.mini.tokenizer.EOT),
        max_sequence_length=256,
    )
    model = LLaDA(config)
    # a large gain: the answers depend on the prompt, and no two logits are close
    model.init_weights(torch.Generator().manual_seed(1), gain=4.0)
    return model.requires_grad_(False).eval()
