"""The plain loop gives the tokens of dllmq.diffusion, and is as plain as it says."""

import pytest
import tiny_llada
import torch
from torch import Tensor

from dllmq.bench.reference_loop import gumbel, plain_generate, transfer_counts
from dllmq.diffusion import SamplerConfig, generate


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    prompts = tiny_llada.tiny_prompts(lengths)
    width = max(lengths)
    rows = [torch.cat([torch.full((width - len(p),), tiny_llada.EOS), p]) for p in prompts]
    keep = [torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]) for p in prompts]
    return torch.stack(rows), torch.stack(keep).long()


@pytest.mark.parametrize(
    ("gen_length", "steps", "block_length"),
    [(16, 16, 16), (16, 16, 4), (16, 6, 8), (16, 4, 4), (8, 16, 8)],
    ids=["one block", "blocks", "uneven counts", "several tokens a step", "more steps than tokens"],
)
def test_tokens_are_those_of_generate(gen_length: int, steps: int, block_length: int) -> None:
    model, (ids, keep) = tiny_llada.tiny_model(), padded((5, 3, 7))
    config = SamplerConfig(gen_length, steps, block_length)
    expected = generate(model, ids, config, keep)
    assert torch.equal(plain_generate(model, ids, config, keep).tokens, expected.tokens)
    assert torch.equal(plain_generate(model, ids, config, keep, torch.float64).tokens, expected.tokens)


def test_masks_of_the_prompt_compete_for_the_quota() -> None:
    model, ids = tiny_llada.tiny_model(), torch.tensor([[1, tiny_llada.MASK, 3, 4]])
    config = SamplerConfig(8, 8, 4)
    plain = plain_generate(model, ids, config).tokens
    assert torch.equal(plain, generate(model, ids, config).tokens)
    assert int((plain == tiny_llada.MASK).sum()) == 1


def test_every_step_runs_the_model_over_the_whole_canvas() -> None:
    """Also those steps that commit nothing."""
    model, shapes = tiny_llada.tiny_model(), []
    model.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    ids, keep = padded((5, 3))
    made = plain_generate(model, ids, SamplerConfig(4, 8, 4), keep)
    assert shapes == [(2, 9, tiny_llada.VOCAB)] * 8 and made.forwards == 8


def test_the_prompt_is_left_as_it_is() -> None:
    model, (ids, keep) = tiny_llada.tiny_model(), padded((5, 3))
    before = ids.clone()
    made = plain_generate(model, ids, SamplerConfig(4, 4, 4), keep)
    assert torch.equal(ids, before) and torch.equal(made.tokens[:, :5], before)


def test_published_counts() -> None:
    """ML-GSAI/LLaDA `get_num_transfer_tokens`: the remainder goes to the first steps."""
    assert transfer_counts(torch.tensor([16, 5, 0]), 5).tolist() == [[4, 3, 3, 3, 3], [1] * 5, [0] * 5]


def test_noise_is_none_at_temperature_0_and_the_published_at_others() -> None:
    logits = torch.randn(1, 2, 5)
    assert gumbel(logits, 0.0, None) is logits
    u = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noisy = gumbel(logits, 0.7, torch.Generator().manual_seed(3))
    assert torch.equal(noisy, logits.double().exp() / (-u.log()) ** 0.7)


@pytest.mark.parametrize("changes", [{"remasking": "random"}, {"cfg_scale": 1.0}])
def test_other_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="low_confidence"):
        plain_generate(tiny_llada.tiny_model(), torch.ones(1, 2).long(), SamplerConfig(4, 4, 4, **changes))
