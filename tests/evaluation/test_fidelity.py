"""Fidelity: KL and top-1 by their definitions, on the states and positions they claim."""

from pathlib import Path

import pytest
import torch

from dllmq.calibration.states import iterate_rows, record_trajectories
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation import fidelity
from dllmq.models.llada import LLaDA, LLaDAConfig

SAMPLER = SamplerConfig(gen_length=8, steps=8, block_length=4)


def tiny(seed: int) -> LLaDA:
    config = LLaDAConfig(
        d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=40, mask_token_id=2, eos_token_id=0
    )
    model = LLaDA(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def trajectories():
    prompts = [torch.randint(6, 40, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 5, 7)]
    return record_trajectories(tiny(0), prompts, SAMPLER, batch_size=2)


def by_hand(p_model: LLaDA, q_model: LLaDA, rows) -> tuple[list[float], list[float]]:
    """KL and agreement of each state, one unpadded forward at a time."""
    kls, agreements = [], []
    for row in rows:
        p, q = (torch.log_softmax(m(row.tokens[None])[0][row.masked], -1) for m in (p_model, q_model))
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
        agreements.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    return kls, agreements


def test_a_model_agrees_with_itself(trajectories) -> None:
    ref = fidelity.reference(tiny(0), trajectories, count=10, batch_size=4)
    found = fidelity.measure(tiny(0), ref)
    assert found.values["kl"]["value"] == 0
    assert found.values["top1"]["value"] == 1


def test_values_and_curves_are_those_of_the_definition(trajectories) -> None:
    rows = list(iterate_rows(trajectories))
    ref = fidelity.reference(tiny(0), trajectories, count=len(rows), batch_size=4)
    found = fidelity.measure(tiny(1), ref)
    kls, agreements = by_hand(tiny(0), tiny(1), rows)
    assert found.values["kl"]["n"] == len(rows) == 24
    assert found.values["kl"]["value"] == pytest.approx(sum(kls) / 24, rel=1e-4)
    assert found.values["top1"]["value"] == pytest.approx(sum(agreements) / 24, rel=1e-4)
    for step, value in zip(*found.curves["kl_by_step"].values(), strict=True):
        chosen = [kl for kl, row in zip(kls, rows, strict=True) if row.step == step]
        assert value == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)
    assert found.curves["kl_by_step"]["step"] == list(range(8))
    by_block = found.curves["kl_by_mask_ratio"]
    assert by_block["step"] == [0, 1, 2, 3]
    for block, value in enumerate(by_block["value"]):
        chosen = [
            kl for kl, row in zip(kls, rows, strict=True) if int((1 - row.mask_ratio) * 4 + 1e-6) == block
        ]
        assert value == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)


def test_standard_error_is_over_prompts(trajectories) -> None:
    """With equally many states of each prompt it is the error of the mean of the prompts' means."""
    rows = list(iterate_rows(trajectories))
    ref = fidelity.reference(tiny(0), trajectories, count=len(rows), batch_size=4)
    kls, _ = by_hand(tiny(0), tiny(1), rows)
    means = torch.tensor([sum(kls[i * 8 : i * 8 + 8]) / 8 for i in range(3)])
    expected = float(means.std() / 3**0.5)
    assert fidelity.measure(tiny(1), ref).values["kl"]["stderr"] == pytest.approx(expected, rel=1e-3)


def test_positions_can_be_bounded(trajectories) -> None:
    ref = fidelity.reference(tiny(0), trajectories, count=12, batch_size=4, positions_per_state=2)
    for state, at in zip(ref.states, ref.positions, strict=True):
        assert bool((at <= state.masked).all())
        assert torch.equal(at.sum(1), state.masked.sum(1).clamp(max=2))
    assert fidelity.measure(tiny(0), ref).values["kl"]["value"] == 0


def test_a_reference_survives_the_disk(trajectories, tmp_path: Path) -> None:
    ref = fidelity.reference(tiny(0), trajectories, count=9, batch_size=4)
    fidelity.save_reference(ref, tmp_path / "ref.safetensors")
    read = fidelity.load_reference(tmp_path / "ref.safetensors")
    assert fidelity.measure(tiny(1), read) == fidelity.measure(tiny(1), ref)
    assert list(tmp_path.iterdir()) == [tmp_path / "ref.safetensors"]


def test_selection_follows_the_seed(trajectories) -> None:
    one, same, other = (
        [(r.prompt, r.step) for r in fidelity.select_states(trajectories, 8, seed)] for seed in (0, 0, 1)
    )
    assert one == same != other
