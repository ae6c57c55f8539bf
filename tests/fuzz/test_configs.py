"""Generated command lines: a valid one composes and dry-runs, a broken one is one sentence, at any size."""

import pytest
from composed import composed
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from dllmq import estimate
from dllmq.config import check_cell, check_choices
from dllmq.run import describe

# Values that go with every other value here, on the embedded model.
VALID: dict[str, list[str]] = {
    "method": ["fp", "rtn", "gptq", "awq"],
    "tasks": ["mini", "mini_gsm", "mini_choice"],
    "calibration.states": ["clean", "random_mask", "uniform", "tmas"],
    "tmas": ["true", "false"],
    "cgq": ["true", "false"],
    "iaaq": ["true", "false"],
    "bits": ["auto", *(f"w{w}a{a}" for w in range(2, 9) for a in (2, 3, 4, 8, 16))],
    "attn_bits": ["auto", "none", "4", "8"],
    "group_size": ["-1", "0", "16", "32"],
    "act_group_size": ["-1", "16", "32"],
    "symmetric": ["true", "false"],
    "act_symmetric": ["true", "false"],
    "value_scale": ["minmax", "mse", "iaaq"],
    "value_granularity": ["tensor", "head", "channel"],
    "cgq_unmasked": ["0.1", "0.35", "1"],
    "cgq_unmasked_confidence": ["zero", "model"],
    "iaaq_alpha_min": ["0.5", "0.9"],
    "export": ["null", "dequantized"],
    "backend": ["auto", "fake"],
    "memory": ["auto", "whole", "stream"],
    "max_state_bytes": ["null", "0", "1000"],
    "sampler.steps": ["3", "48", "96"],
    "sampler.temperature": ["0.0", "0.7"],
    "sampler.cfg_scale": ["0.0", "1.5"],
    "sampler.remasking": ["low_confidence", "random"],
    "eval.limit": ["1", "7", "null"],
    "eval.batch_size": ["1", "25"],
    "eval.eos_cut": ["first", "none"],
    "eval.mc_num": ["auto", "8", "16"],
    "eval.fidelity_states": ["0", "3"],
    "calibration.num_states": ["1", "64"],
    "calibration.batch_size": ["1", "16"],
    "threads": ["null", "1"],
    "seed": ["0", "17"],
    "tracker": ["none", "wandb"],
    "resume": ["true", "false"],
}  # fmt: skip
WRONG = [
    "",
    "maybe",
    "-7",
    "1e999",
    "nan",
    "[1,2]",
    "{a:1}",
    "0.3.1",
    "w0a0",
    "9" * 30,
    "a b",
    "é",
    "../..",
    "${x}",
]
BROKEN_KEYS = [
    "tmass",
    "method.solvr",
    "evall.limit",
    "a.b.c",
    "model.sampler",
    "calibration",
    "hydra.x",
    "tasks.names",
]


def overrides(values: dict[str, list[str]]) -> st.SearchStrategy[list[str]]:
    """Any of the keys, each once, each with any of its values."""
    pairs = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in values.items()})
    return pairs.map(lambda chosen: [f"{k}={v}" for k, v in chosen.items()])


def checked(words: list[str]) -> str:
    """What the user reads: the plan, or the sentence."""
    try:
        check_choices(words)
        plan = check_cell(composed(*words))
    except ValueError as error:
        text = " ".join(str(error).split())
        assert len(text) > 15 and "Traceback" not in text and "object at 0x" not in text, text
        return text
    except (HydraException, OmegaConfBaseException) as error:  # what Hydra itself says of a command line
        return f"hydra: {error}"
    return describe(plan, "cell")


@pytest.fixture(autouse=True, scope="module")
def nothing_is_timed() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(estimate, "seconds_per_token", lambda *_: 1e-6)


def valid_words_dry_run(words: list[str]) -> None:
    said = checked(words)
    assert said.startswith("cell: checked, nothing run"), f"{words}: {said}"
    assert "time         shared: at most about" in said and "memory" in said


def broken_words_are_told(words: list[str], key: str, value: str, add: bool) -> None:
    said = checked([*words, f"{'++' if add else ''}{key}={value}"])
    assert said.strip()


BROKEN = {
    "words": overrides(VALID),
    "key": st.sampled_from([*VALID, *BROKEN_KEYS]),
    "value": st.sampled_from(WRONG),
    "add": st.booleans(),
}
plain = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(plain, max_examples=25)
@given(overrides(VALID))
def test_valid_configs_dry_run(words: list[str]) -> None:
    valid_words_dry_run(words)


@settings(plain, max_examples=40)
@given(**BROKEN)
def test_broken_configs_are_one_sentence(words: list[str], key: str, value: str, add: bool) -> None:
    broken_words_are_told(words, key, value, add)


@pytest.mark.slow
@settings(plain, max_examples=400)
@given(overrides(VALID))
def test_four_hundred_valid_configs_dry_run(words: list[str]) -> None:
    valid_words_dry_run(words)


@pytest.mark.slow
@settings(plain, max_examples=600)
@given(**BROKEN)
def test_six_hundred_broken_configs_are_one_sentence(
    words: list[str], key: str, value: str, add: bool
) -> None:
    broken_words_are_told(words, key, value, add)
