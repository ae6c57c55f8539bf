"""The last block where hidden states are read: the same numbers as the whole forward, for less work."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dllmq.diffusion import SamplerConfig, apply, denoise, generate, log_likelihood
from dllmq.diffusion.predict import hidden_states, lazy_states
from dllmq.models.attention import QuantizedProduct
from dllmq.models.dream import Dream, DreamConfig
from dllmq.models.linear import QuantLinear
from dllmq.models.llada import LLaDA, LLaDAConfig
from dllmq.numerics import Grid, QuantizedTensor, fit, quantize

MASK, EOS = 39, 38


def llada() -> LLaDA:
    config = LLaDAConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48, vocab_size=40,
                         mask_token_id=MASK, eos_token_id=EOS, eot_token_id=37)  # fmt: skip
    model = LLaDA(config)
    model.init_weights(torch.Generator().manual_seed(0), gain=3.0)
    return model.requires_grad_(False).eval()


def dream() -> Dream:
    torch.manual_seed(0)
    config = DreamConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, vocab_size=40, mask_token_id=MASK, eos_token_id=EOS,
                         rope_theta=1e4)  # fmt: skip
    model = Dream(config).requires_grad_(False).eval()
    for p in model.parameters():
        p.mul_(3.0 if p.dim() > 1 else 1.0)
    return model


class Whole:
    """A model that has hidden states of all columns only."""

    def __init__(self, model: LLaDA | Dream) -> None:
        self.config, self.device, self.head = model.config, model.device, model.head
        self.hidden_states = model.hidden_states


def canvas(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 37, (rows, columns), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(columns) >= 2 * torch.arange(rows)[:, None]).long()


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize(("padded", "cfg_scale"), [(False, 0.0), (True, 0.0), (True, 1.5)])
@pytest.mark.parametrize(
    "at", [[(0, 0)], [(0, 31), (2, 32)], [(1, 69), (0, 3)], [(2, 64)], [(1, 40), (2, 41)]]
)
def test_states_are_those_of_the_whole_forward(
    make: Callable, padded: bool, cfg_scale: float, at: list[tuple[int, int]]
) -> None:
    """Also where a window begins or ends, at the canvas's edges, and at a row's first token."""
    model, (x, mask) = make(), canvas(3, 70)
    attention_mask = mask if padded else None
    given = torch.arange(70).expand(3, 70) < 30
    where = torch.zeros(3, 70, dtype=torch.bool)
    for row, column in at:
        where[row, column] = True
    whole = hidden_states(model, x, attention_mask, given, cfg_scale)
    lazy = lazy_states(model, x, attention_mask, given, cfg_scale)
    assert len(whole) == len(lazy) == 1 + (cfg_scale > 0)
    for a, b in zip(whole, lazy, strict=True):
        equal(a[where], b[where.nonzero(as_tuple=True)])
        equal(a[mask > 0], b[(mask > 0).nonzero(as_tuple=True)])  # and a second time, elsewhere


OPTIONS = [
    {},
    {"cfg_scale": 1.5},
    {"temperature": 0.8},
    {"remasking": "random"},
    {"confidence_eos_eot_inf": True, "logits_eos_inf": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("observe", ["committable", "all"])
def test_llada_denoises_the_same(options: dict, observe: str) -> None:
    model, (ids, mask), config = llada(), canvas(3, 38), SamplerConfig(24, 6, 8, **options)
    ids[1, 30] = MASK  # a mask of the prompt widens the window
    runs = [
        list(denoise(m, ids, config, mask, torch.Generator().manual_seed(0), observe, True))
        for m in (model, Whole(model))
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(apply(a), apply(b)) and a.logits is not None
        equal(a.score, b.score)
        equal(a.logits, b.logits)


@pytest.mark.parametrize(
    "options",
    [{"remasking": "entropy"}, {"remasking": "origin", "temperature": 0.6}, {"remasking": "topk_margin"}],
)
def test_dream_denoises_the_same(options: dict) -> None:
    model, (ids, mask), config = dream(), canvas(3, 38), SamplerConfig(24, 8, 24, **options)
    a, b = (
        generate(m, ids, config, mask, torch.Generator().manual_seed(0)).tokens for m in (model, Whole(model))
    )
    assert torch.equal(a, b)


def quantized() -> LLaDA:
    """Weights, inputs and attention product at 8 bits."""
    model = llada()
    for block in model.blocks:
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            W, grid = getattr(block, name).weight, Grid(8)
            setattr(block, name, QuantLinear(quantize_weight(W, grid), None, Grid(8), torch.float32))
        v = Grid(8)
        block.product = QuantizedProduct(Grid(8), v, fit(torch.tensor([[-4.0, 4.0]]), v), Grid(8))
    return model


def quantize_weight(W: Tensor, grid: Grid) -> QuantizedTensor:
    params = fit(W, grid)
    return QuantizedTensor(quantize(W, params, grid), params.scale, params.zero, grid)


def test_quantized_models_denoise_the_same() -> None:
    model, (ids, mask), config = quantized(), canvas(3, 38), SamplerConfig(16, 4, 8)
    a, b = (generate(m, ids, config, mask).tokens for m in (model, Whole(model)))
    assert torch.equal(a, b)


def test_likelihoods_are_the_same() -> None:
    model, (ids, _) = llada(), canvas(2, 60)
    a, b = (
        log_likelihood(m, ids[0, :40], ids[1, :12], 8, 8, generator=torch.Generator().manual_seed(0))
        for m in (model, Whole(model))
    )
    assert a == pytest.approx(b, rel=1e-6)


def test_the_last_block_runs_in_windows_only() -> None:
    """At a multiple of 32 columns around the block; its keys and values everywhere."""
    model, (ids, _) = llada(), canvas(2, 70)
    rows: dict[str, list[int]] = {"q_proj": [], "k_proj": [], "ff_proj": [], "first": []}
    for name in ("q_proj", "k_proj", "ff_proj"):
        getattr(model.blocks[-1], name).register_forward_pre_hook(
            lambda _, x, name=name: rows[name].append(x[0].shape[1])
        )
    model.blocks[0].ff_proj.register_forward_pre_hook(lambda _, x: rows["first"].append(x[0].shape[1]))
    generate(model, ids, SamplerConfig(32, 4, 8))
    assert rows["k_proj"] == rows["first"] == [102] * 4
    assert rows["q_proj"] == rows["ff_proj"] == [32, 32, 32, 102 - 64]
