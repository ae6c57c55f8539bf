"""Fidelity: its figures by their definitions, on the states and positions they claim."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llada
import torch

from dllmq.calibration.states import iterate_rows, record_trajectories
from dllmq.diffusion import SamplerConfig, denoise
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
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, count=10, batch_size=4)
    found = fidelity.measure(tiny(0), ref)
    expected = {"kl": 0, "top1": 1, "argmax_at_k": 1, "slots_at_k": 1, "hidden_error": 0}
    assert {name: figure["value"] for name, figure in found.values.items()} == expected


def test_values_and_curves_are_those_of_the_definition(trajectories) -> None:
    rows = list(iterate_rows(trajectories))
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, count=len(rows), batch_size=4)
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
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, count=len(rows), batch_size=4)
    kls, _ = by_hand(tiny(0), tiny(1), rows)
    means = torch.tensor([sum(kls[i * 8 : i * 8 + 8]) / 8 for i in range(3)])
    expected = float(means.std() / 3**0.5)
    assert fidelity.measure(tiny(1), ref).values["kl"]["stderr"] == pytest.approx(expected, rel=1e-3)


def test_positions_can_be_bounded(trajectories) -> None:
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, count=12, batch_size=4, positions_per_state=2)
    for state, at in zip(ref.states, ref.positions, strict=True):
        assert bool((at <= state.masked).all())
        assert torch.equal(at.sum(1), state.masked.sum(1).clamp(max=2))
    assert fidelity.measure(tiny(0), ref).values["kl"]["value"] == 0


def test_a_reference_survives_the_disk(trajectories, tmp_path: Path) -> None:
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, count=9, batch_size=4)
    fidelity.save_reference(ref, tmp_path / "ref.safetensors")
    read = fidelity.load_reference(tmp_path / "ref.safetensors")
    assert fidelity.measure(tiny(1), read) == fidelity.measure(tiny(1), ref)
    assert list(tmp_path.iterdir()) == [tmp_path / "ref.safetensors"]


def test_selection_follows_the_seed(trajectories) -> None:
    one, same, other = (
        [(r.prompt, r.step) for r in fidelity.select_states(trajectories, 8, seed)] for seed in (0, 0, 1)
    )
    assert one == same != other


def test_decisions_are_counted_on_what_full_precision_commits() -> None:
    """Restated with sorted(), one unpadded forward at a time: two blocks of 8, two commits a step."""
    sampler = SamplerConfig(gen_length=16, steps=8, block_length=8)
    fp, q = (tiny_llada.tiny_model(seed) for seed in (0, 1))
    runs = record_trajectories(fp, tiny_llada.tiny_prompts(), sampler, batch_size=2)
    argmax, slots = [], []
    for run, step in itertools.product(runs, range(8)):
        end = run.prompt_length + (8 if step < 4 else 16)
        ours, theirs = (torch.softmax(model(run.tokens[step][None])[0], -1) for model in (fp, q))
        places = [i for i in range(end) if run.masked[step, i]]
        chosen = sorted(places, key=lambda i: (-float(theirs[i].max()), i))[:2]
        committed = run.committed[step].nonzero()[:, 0].tolist()
        assert len(committed) == 2
        argmax.append(sum(bool(ours[i].argmax() == theirs[i].argmax()) for i in committed) / 2)
        slots.append(len(set(chosen) & set(committed)) / 2)
    found = fidelity.measure(q, fidelity.reference(fp, runs, sampler, count=32, batch_size=4))
    assert found.values["argmax_at_k"]["value"] == pytest.approx(sum(argmax) / 32)
    assert found.values["slots_at_k"]["value"] == pytest.approx(sum(slots) / 32)
    assert 8 < sum(slots) < 32  # 8: a block's last step leaves no choice
    means = [sum(slots[i : i + 8]) / 8 for i in range(0, 32, 8)]
    assert found.per_prompt["slots_at_k"] == pytest.approx(means)


@pytest.mark.parametrize(
    "changes",
    [{}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}, {"cfg_scale": 0.5}],
    ids=["plain", "logits_eos_inf", "confidence_eos_eot_inf", "guided"],
)
def test_slots_are_those_of_the_sampler(changes) -> None:
    """In the first step both models see the same state, so `denoise` itself says what q would commit."""
    sampler = replace(SamplerConfig(gen_length=16, steps=4, block_length=16), **changes)
    prompts = tiny_llada.tiny_prompts()
    fp, q = (tiny_llada.tiny_model(seed) for seed in (0, 1))
    for model in (fp, q):  # EOS and EoT win over frequent tokens, so that the flags change what is chosen
        head = model.transformer["ff_out"].weight
        head[[tiny_llada.EOS, tiny_llada.EOT]] = 1.3 * head[[34, 32]]
    runs = record_trajectories(fp, prompts, sampler, batch_size=4)
    found = fidelity.measure(q, fidelity.reference(fp, runs, sampler, count=16, batch_size=4))
    shares = []
    for run, prompt in zip(runs, prompts, strict=True):
        first = next(iter(denoise(q, prompt[None], sampler))).committed[0]
        shares.append(int((first & run.committed[0]).sum()) / int(run.committed[0].sum()))
    assert found.curves["slots_at_k_by_step"]["value"][0] == pytest.approx(sum(shares) / 4)
    assert (
        fidelity.measure(fp, fidelity.reference(fp, runs, sampler, 16, 4)).values["slots_at_k"]["value"] == 1
    )


@pytest.mark.parametrize("changes", [{"remasking": "random"}, {"temperature": 0.5}])
def test_no_slots_where_confidence_does_not_decide(trajectories, changes) -> None:
    sampler = replace(SAMPLER, **changes)
    ref = fidelity.reference(tiny(0), trajectories, sampler, count=6, batch_size=4)
    assert list(fidelity.measure(tiny(1), ref).values) == ["kl", "top1", "argmax_at_k", "hidden_error"]


def test_decisions_do_not_depend_on_the_bound_of_positions(trajectories) -> None:
    few, every = (
        fidelity.measure(tiny(1), fidelity.reference(tiny(0), trajectories, SAMPLER, 24, 4, 0, most)).values
        for most in (1, None)
    )
    assert few["kl"] != every["kl"]
    assert all(few[name] == every[name] for name in ("argmax_at_k", "slots_at_k", "hidden_error"))


def test_hidden_error_is_that_of_the_definition(trajectories) -> None:
    """All states kept; block outputs from one unpadded pass per state through embed, context and blocks."""

    def outputs(model: LLaDA, tokens: torch.Tensor) -> list[torch.Tensor]:
        x, found = model.embed(tokens[None]), []
        for block in model.blocks:
            x = block(x, model.context(len(tokens)))
            found.append(x)
        return found

    rows = list(iterate_rows(trajectories))
    errors = torch.tensor(
        [
            [
                float((b - a).norm() / a.norm())
                for a, b in zip(*(outputs(tiny(s), row.tokens) for s in (0, 1)), strict=True)
            ]
            for row in rows
        ]
    )
    found = fidelity.measure(tiny(1), fidelity.reference(tiny(0), trajectories, SAMPLER, len(rows), 4))
    assert found.values["hidden_error"]["value"] == pytest.approx(float(errors.mean()), rel=1e-4)
    by_block = found.curves["hidden_error_by_block"]
    assert by_block["step"] == [0, 1]
    assert by_block["value"] == pytest.approx(errors.mean(0).tolist(), rel=1e-4)
    by_step = [float(errors[[row.step == s for row in rows]].mean()) for s in range(8)]
    assert found.curves["hidden_error_by_step"]["value"] == pytest.approx(by_step, rel=1e-4)


def test_hidden_states_kept_are_spread_over_the_prompts(trajectories) -> None:
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, 24, 4, hidden_states_kept=3)
    kept, prompt = torch.cat(ref.kept), torch.cat(ref.prompt)
    assert prompt[kept].tolist() == [0, 1, 2]
    found = fidelity.measure(tiny(1), ref)
    assert found.values["hidden_error"]["n"] == 3 and found.values["kl"]["n"] == 24
    none = fidelity.reference(tiny(0), trajectories, SAMPLER, 24, 4, hidden_states_kept=0)
    assert sum(part.numel() for part in none.blocks) == 0
    assert not [name for name in fidelity.measure(tiny(1), none).curves if "hidden" in name]


def test_per_prompt_values_are_means_over_the_states_of_a_prompt(trajectories) -> None:
    rows = list(iterate_rows(trajectories))
    found = fidelity.measure(tiny(1), fidelity.reference(tiny(0), trajectories, SAMPLER, len(rows), 4))
    kls, agreements = by_hand(tiny(0), tiny(1), rows)
    assert set(found.per_prompt) == {"kl", "top1", "argmax_at_k", "slots_at_k", "hidden_error"}
    for name, values in (("kl", kls), ("top1", agreements)):
        means = [sum(values[i : i + 8]) / 8 for i in (0, 8, 16)]
        assert found.per_prompt[name] == pytest.approx(means, rel=1e-4)


def test_a_prompt_without_states_is_null(trajectories) -> None:
    ref = fidelity.reference(tiny(0), trajectories, SAMPLER, count=1, batch_size=4)
    values = fidelity.measure(tiny(1), ref).per_prompt["kl"]
    assert [value is None for value in values] == [i != int(ref.prompt[0]) for i in range(3)]


def test_slots_spent_on_the_mask_are_no_commits() -> None:
    """A model that predicts the mask in the place of a frequent token: slots are lost."""
    model, sampler = tiny_llada.tiny_model(), SamplerConfig(gen_length=16, steps=4, block_length=16)
    head = model.transformer["ff_out"].weight
    head[tiny_llada.MASK] = 1.3 * head[32]
    runs = record_trajectories(model, tiny_llada.tiny_prompts(), sampler, batch_size=2)
    k = torch.cat([run.committed.sum(1) for run in runs])
    assert bool((k == 0).any()) and bool(((k > 0) & (k < 4)).any())
    found = fidelity.measure(model, fidelity.reference(model, runs, sampler, count=16, batch_size=4))
    assert found.values["kl"]["n"] == 16
    for name in ("argmax_at_k", "slots_at_k"):
        assert found.values[name]["n"] == int((k > 0).sum())
        assert found.values[name]["value"] == 1
