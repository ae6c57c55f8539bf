"""Training rows and the training itself, on a model of a few thousand parameters; the shipped folder."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dllmq.mini.train as training
from dllmq.config import EMBEDDED
from dllmq.diffusion import SamplerConfig, generate
from dllmq.mini.train import TrainConfig, learning_rate_factor, loss_on, model_config, optimizers, train
from dllmq.mini.training_data import (
    BLOCK_LENGTH,
    GEN_LENGTH,
    Batch,
    DataConfig,
    Row,
    batches,
    canvas_length,
    draw_rows,
    mask_rows,
)
from dllmq.models import load_model
from dllmq.models.llada import LLaDA
from dllmq.models.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(EMBEDDED)
EQUALS, NEWLINE = TOKENIZER.get_vocab()["="], TOKENIZER.get_vocab()["Ċ"]
TINY = TrainConfig(
    d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=24, steps=12, warmup=2, rows=8, adam_lr=2e-2
)


def masked_rows(data: DataConfig, n: int = 200) -> list[tuple[Row, Tensor, Tensor, Tensor]]:
    """(row, tokens [L], masked [L], weight [L]) of n drawn rows, on one canvas."""
    rows = draw_rows(n, data, 3, TOKENIZER)
    L = max(map(canvas_length, rows))
    tokens = torch.tensor([(r.prompt + r.response + [TOKENIZER.eos_token_id] * L)[:L] for r in rows])
    g = torch.Generator().manual_seed(0)
    masked, weight = mask_rows(rows, tokens, data, EQUALS, NEWLINE, g)
    return list(zip(rows, tokens, masked, weight, strict=True))


# ------------------------------------------------------------------ rows


def test_masks_lie_inside_responses_only() -> None:
    for row, _, masked, _ in masked_rows(DataConfig()):
        assert not masked[: len(row.prompt)].any()


def test_block_wise_rows_are_states_of_the_semi_autoregressive_sampler() -> None:
    """Clean prefix, one block with some masks, all masked after it."""
    partly = 0
    for row, _, masked, weight in masked_rows(DataConfig(drill=0.0, block=1.0)):
        response, w = masked[len(row.prompt) :][:GEN_LENGTH], weight[len(row.prompt) :][:GEN_LENGTH]
        blocks = [b.float().mean().item() for b in response.split(BLOCK_LENGTH)]
        current = next((i for i, share in enumerate(blocks) if share), len(blocks) - 1)
        assert all(share == 1 for share in blocks[current + 1 :])
        text = len(row.response) // BLOCK_LENGTH + 1
        assert current <= text  # the current block holds text or the first EOS, or none of it was masked
        partly += 0 < blocks[current] < 1
        later = w[BLOCK_LENGTH * (current + 1) :]
        assert later.numel() == 0 or later.max() <= 0.3 + 1e-6
    assert partly > 100


def test_rows_masked_everywhere_follow_the_forward_process() -> None:
    rows = masked_rows(DataConfig(drill=0.0, block=0.0), 400)
    ratio = torch.stack([m[len(r.prompt) :].float().mean() for r, _, m, _ in rows])
    assert ratio.mean() == pytest.approx((1 + 0.05) / 2, abs=0.05) and ratio.min() >= 0 and ratio.max() > 0.9
    for row, _, _, weight in rows:
        end = len(row.prompt) + len(row.response)
        assert (weight[: end + 1] == 1).all() and (
            weight[end + 1 :] < 1
        ).all()  # the first EOS counts in full


def test_drills_mask_results_only() -> None:
    masks = 0
    for row, tokens, masked, _ in masked_rows(DataConfig(drill=1.0)):
        assert row.drill and not row.prompt
        answering = False
        for token, hidden in zip(tokens.tolist(), masked.tolist(), strict=True):
            answering = (answering or token == EQUALS) and token != NEWLINE
            assert not hidden or (answering and token != EQUALS)
        masks += int(masked.sum())
    assert masks > 1000


def test_the_mix_of_rows() -> None:
    rows = draw_rows(1000, DataConfig(), 0, TOKENIZER)
    header = TOKENIZER.convert_tokens_to_ids("<|start_header_id|>")
    code = TOKENIZER.convert_tokens_to_ids("def")
    assert sum(r.drill for r in rows) == pytest.approx(300, abs=50)
    assert sum(r.prompt[:1] == [code] for r in rows) == pytest.approx(220, abs=45)
    assert sum(header in r.prompt for r in rows) == pytest.approx(0.15 * 480, abs=30)
    assert all(len(r.response) < GEN_LENGTH for r in rows if not r.drill)  # the answer and an EOS fit


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "masked", "weight"))


def test_batches_resume_where_they_stopped() -> None:
    data = DataConfig()
    whole = list(islice(batches(TOKENIZER, data, 4, seed=1), 40))  # over the border of a pool
    for first in (3, 33):
        resumed = islice(batches(TOKENIZER, data, 4, seed=1, first=first), 40 - first)
        assert all(same(a, b) for a, b in zip(whole[first:], resumed, strict=True))
    other = next(batches(TOKENIZER, data, 4, seed=2))
    assert other.tokens.shape != whole[0].tokens.shape or not same(other, whole[0])


def test_batches_have_few_canvas_lengths() -> None:
    for batch in islice(batches(TOKENIZER, DataConfig(), 4, seed=0), 20):
        assert batch.tokens.shape[0] == 4 and batch.tokens.shape[1] % 8 == 0


# ------------------------------------------------------------------ training


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = TrainConfig(steps=100, warmup=10, decay=0.5)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:51] == [1.0] * 42
    assert factors[51:] == pytest.approx([(100 - s) / 50 for s in range(51, 100)])
    assert learning_rate_factor(0, TrainConfig(warmup=0)) == 1.0


def test_every_parameter_has_one_optimizer() -> None:
    model = LLaDA(model_config(TINY, TOKENIZER))
    muon, adam = (
        {id(p) for group in optim.param_groups for p in group["params"]} for optim in optimizers(model, TINY)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert not muon & adam and muon | adam == names.keys()
    assert all(".blocks." in names[i] and "norm" not in names[i] for i in muon)


def test_loss_of_a_uniform_prediction_is_the_log_of_the_vocabulary() -> None:
    model = LLaDA(model_config(TINY, TOKENIZER))
    for p in model.parameters():
        p.data.zero_()
    batch = next(batches(TOKENIZER, DataConfig(), 8, seed=0))
    loss, _ = loss_on(model, batch)
    assert loss.item() == pytest.approx(torch.tensor(float(len(TOKENIZER))).log().item(), rel=1e-5)


@pytest.fixture
def shipped_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training counts words to build the tokenizer, which takes seconds; here it is read from disk."""
    monkeypatch.setattr(training, "build_tokenizer", lambda: load_tokenizer(EMBEDDED))


@pytest.mark.usefixtures("shipped_tokenizer")
def test_training_learns_resumes_and_writes_a_published_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(TINY, tmp_path / "whole", compiled=False, every=6)

    untrained = LLaDA(model_config(TINY, TOKENIZER))
    untrained.init_weights(torch.Generator().manual_seed(TINY.seed))
    seen_by_none = next(batches(TOKENIZER, TINY.data, 32, seed=99))
    with torch.no_grad():
        before, after = (loss_on(m, seen_by_none)[0].item() for m in (untrained, trained))
    assert after < before - 1.0

    # interrupted in its tenth step, and started again by the same command
    def broken(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        yield from islice(batches(*args, **kwargs), 9)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "batches", broken)
        train(TINY, tmp_path / "resumed", compiled=False, every=6)
    assert torch.load(tmp_path / "resumed" / "checkpoint.pt", weights_only=True)["step"] == 6
    resumed = train(TINY, tmp_path / "resumed", compiled=False, every=6)
    for (name, p), q in zip(trained.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name

    folder = tmp_path / "whole"
    loaded = load_model(folder)
    for (name, p), q in zip(trained.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == q[0] and torch.equal(p.to(torch.bfloat16).float(), q[1])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    weights, config = folder / "model.safetensors", folder / "config.json"
    assert weights.stat().st_mode == config.stat().st_mode  # readable by whom the user lets read
    assert not list(folder.glob("*.part"))


# ------------------------------------------------------------------ what ships


def test_the_shipped_model_is_small_loads_and_generates() -> None:
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 8e6
    model = load_model(EMBEDDED)
    assert model.config.logit_size == len(TOKENIZER)
    ids = torch.tensor([TOKENIZER("Question: Ann has 3 pens.", add_special_tokens=False)["input_ids"]])
    sampler = SamplerConfig(gen_length=16, steps=4, block_length=16)
    tokens = generate(model, ids, sampler).tokens
    assert torch.equal(tokens[:, : ids.shape[1]], ids) and model.config.mask_token_id not in tokens
