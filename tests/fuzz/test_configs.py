"""Generated command lines: a valid one composes and dry-runs, a broken one is one sentence, at any size.

A command line is a base (presets that go together), a bundle of keys that only go together, and any of the
keys that go with everything. `test_every_key_and_preset_is_drawn` compares all three with conf/.
"""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import yaml
from composed import CONF, GROUPS, composed
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException
from task_files import MAKE, write_task

from dllmq import estimate
from dllmq.config import EMBEDDED, RunConfig, check_cell, check_choices, refused
from dllmq.evaluation.task_settings import rows
from dllmq.run import arguments, describe

Words = list[str]
CODE = "eval.allow_code_execution=true"
SWITCH = ["true", "false"]
# Values that go with every other value here, for every model. DATA and FOLDER: a JSONL file and a folder.
ANY: dict[str, list[str]] = {
    "calibration.states": ["clean", "random_mask", "uniform", "tmas"],
    "calibration.num_states": ["1", "40"],
    "calibration.num_prompts": ["16", "64"],
    "calibration.batch_size": ["1", "16"],
    "calibration.data": ["null", "DATA"],
    "calibration.shares": ["[0.3,0.2,0.2,0.3]", "[1,0]", "[2]"],
    **dict.fromkeys(("tmas", "cgq", "iaaq", "symmetric", "act_symmetric", "resume"), SWITCH),
    "bits": ["auto", *(f"w{w}a{a}" for w in range(2, 9) for a in (2, 3, 4, 8, 16))],
    "attn_bits": ["auto", "none", "4", "8"],
    "group_size": ["-1", "0", "16", "32"],
    "act_group_size": ["-1", "16", "32"],
    "value_scale": ["minmax", "mse", "iaaq"],
    "value_granularity": ["tensor", "head", "channel"],
    "cgq_unmasked": ["0.1", "0.35", "1"],
    "cgq_masked": ["0", "1.5", "1000"],
    "cgq_unmasked_confidence": ["zero", "model"],
    "iaaq_alpha_min": ["0.5", "0.9", "1"],
    "iaaq_alpha_step": ["0.01", "0.1", "1"],
    "export": ["null", "dequantized"],
    "backend": ["auto", "fake"],
    "memory": ["auto", "whole", "stream"],
    "max_state_bytes": ["null", "0", "1000"],
    "eval.limit": ["1", "7", "null"],
    "eval.batch_size": ["1", "25", "auto"],
    "eval.eos_cut": ["first", "none"],
    "eval.mc_num": ["auto", "8", "16"],
    "eval.mc_batch_size": ["1", "8"],
    "eval.fidelity_states": ["0", "3"],
    "eval.fidelity_prompts": ["1", "16"],
    "tasks.chat_template": ["null", "true", "false"],
    "tasks.add_bos": ["null", "true", "false"],
    "model.dtype": ["auto", "float32", "bfloat16"],
    "model.default_bits": ["w3a4", "w8a8"],
    "model.chat_template": SWITCH,
    "model.add_bos": SWITCH,
    "device": ["auto", "cpu"],
    "threads": ["null", "1"],
    "seed": ["0", "17"],
    "name": ["null", "mine", "a/b"],
    "cache_dir": ["null", "FOLDER", "FOLDER/new/one"],
}  # fmt: skip
# Of the methods; each set goes together.
METHODS: list[Words] = [
    *([f"method={name}"] for name in ("fp", "rtn", "gptq", "awq")),
    ["method=gptq", "method.damp=0.1", "method.block_size=7"],
    ["method=gptq", "method.act_order=true", "method.static_groups=true"],
    ["method=awq", "method.n_grid=3", "method.clip=false", "method.solver=gptq"],
]
# What only goes together, on the embedded model and other LLaDAs.
LLADA: list[Words] = [
    [],
    ["sampler.gen_length=48", "sampler.steps=12", "sampler.block_length=16", "sampler.temperature=0.7"],
    ["sampler.cfg_scale=1.5"],
    ["sampler.gen_length=64", "sampler.steps=64", "sampler.block_length=32", "sampler.remasking=random"],
    ["sampler.cache=dual", "sampler.threshold=0.9", "sampler.logits_eos_inf=true"],
    ["sampler.cache=prefix", "sampler.threshold=1.5", "sampler.confidence_eos_eot_inf=true"],
    ["sampler.threshold=0", "sampler.top_p=null", "sampler.top_k=null", "sampler.alg_temp=null"],
    ["bits=w4a8", "attn_bits=qkpv", "export=compressed_tensors"],
    ["bits=w8a3", "attn_bits=v", "sampler.eps=0.001"],
    ["bits=w4a16", "group_size=32", "export=gptq"],
    ["bits=w8a8", "group_size=-1", "act_group_size=-1", "symmetric=true", "backend=packed"],
    ["model.sampler.gen_length=32", "model.sampler.steps=32", "model.sampler.block_length=32"],
    ["model.sampler.remasking=random", "+model.sampler.temperature=0.5"],
    ["model.sampler.logits_eos_inf=true", "model.sampler.confidence_eos_eot_inf=true"],
    ["tasks.names=[mini_choice,mini_gsm]", "tasks.num_fewshot=null", "tasks.settings=default"],
    ["tasks.names=[gsm8k,mini_gsm]", "tasks.data_dir=FOLDER"],
    ["tasks.names=[mini_code]", CODE],
    ["tracker=wandb", "tracker.project=p", "tracker.entity=e", "tracker.mode=offline"],
]
DREAM: list[Words] = [
    ["tasks=mini_gsm"],
    ["sampler.remasking=origin", "sampler.temperature=0", "sampler.top_k=5", "sampler.eps=0.01"],
    ["sampler.remasking=topk_margin", "sampler.top_p=0.5", "sampler.alg_temp=0.3"],
    ["+model.sampler.alg_temp=0.1", "model.sampler.top_p=0.8", "+model.sampler.top_k=9"],
    ["sampler.remasking=maskgit_plus", "sampler.cache=dual", "sampler.threshold=0.9",
     "sampler.block_length=32", "+model.sampler.eps=0.1"],
]  # fmt: skip
EMBEDDED_BASES: list[Words] = [[], ["tasks=mini_choice"], ["experiment=sensitivity", "tracker=none"]]
MORE_BASES: list[Words] = [
    *([f"tasks={name}"] for name in ("mini", "mini_gsm")),
    *([f"tasks={name}", CODE] for name in ("mini_code", "mini_all", "paper")),
    *([f"tasks={name}", CODE] for name in MAKE),
    *([f"sampler={name}"] for name in ("default", "llada_paper", "llada_semi_ar", "fast_dllm")),
    *([f"experiment={name}"] for name in ("ablation", "backends", "bitwidth", "decoding", "granularity")),
    ["model=mini", "model.path=EMBEDDED", "calibration=default"],
    ["model=mini", "model.name=mine"],
]
HUB = [f"model={name}" for name in ("llada_8b_base", "llada_8b_instruct", "llada_1_5")]
DREAMS = [f"model={name}" for name in ("dream_v0_7b_base", "dream_v0_7b_instruct")]
PUBLISHED: list[Words] = [
    [f"model={row.model}", f"tasks={row.task}", f"tasks.settings={row.preset}", CODE] for row in rows()
]
LAUNCHERS: list[Words] = [
    ["hydra/launcher=dllmq_joblib", "hydra.launcher.n_jobs=4"],
    ["hydra/launcher=dllmq_slurm", "hydra.launcher.partition=gpu"],
    ["hydra/launcher=dllmq_local"],
    ["hydra/launcher=dllmq_ray", "hydra.launcher.ray.remote.num_gpus=1"],
]
WRONG = ["", "maybe", "-7", "1e999", "nan", "[1,2]", "{a:1}", "0.3.1", "w0a0", "9" * 30, "a b", "é", "../..",
         "${x}", "null", "2", "a,b", "²", "'", "~", "=", "tmas=true", "\n"]  # fmt: skip
NO_KEYS = [
    *("tmass", "method.solvr", "evall.limit", "a.b.c", "model.sampler", "calibration", "explicit", "~tmas"),
    *("hydra.x", "hydra", "hydra.launcher.n_job", "hydra/launcher", "method._target_", "experiments", ""),
    *("+tmas", "method.block_size.x", "-m"),
]


def all_words() -> list[str]:
    tables = [METHODS, LLADA, DREAM, EMBEDDED_BASES, MORE_BASES, PUBLISHED, LAUNCHERS, [HUB, DREAMS]]
    drawn = [word for table in tables for words in table for word in words]
    return [*drawn, *(f"{key}={value}" for key, values in ANY.items() for value in values)]


KEYS = sorted({word.partition("=")[0].lstrip("+") for word in all_words()} | {"dry_run"})


def chosen(bases: list[Words], bundles: list[Words]) -> st.SearchStrategy[Words]:
    """A base, a method, a bundle and any of the keys that go with everything; a key's later words win."""
    pairs = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in ANY.items()})
    parts = st.tuples(*map(st.sampled_from, (bases, METHODS, bundles)), pairs)

    def merged(drawn: tuple[Words, Words, Words, dict[str, str]]) -> Words:
        base, method, bundle, free = drawn
        words = free | {w.partition("=")[0]: w.partition("=")[2] for w in [*base, *method, *bundle]}
        if not any(word.startswith("tasks") for word in base):
            words.pop("tasks.num_fewshot", None)
        if any(word.startswith("tasks.settings") for word in base):  # whose rows have their own samples
            words = {key: value for key, value in words.items() if not key.startswith("eval.mc_")}
        return [f"{key}={value}" for key, value in words.items()]

    return parts.map(merged)


FEW_WORDS = chosen(
    [[]], [bundle for bundle in LLADA if "tracker=wandb" not in bundle]
)  # presets of methods alone
EMBEDDED_WORDS = chosen(EMBEDDED_BASES, LLADA)
ALL_WORDS = st.one_of(
    EMBEDDED_WORDS,
    chosen(EMBEDDED_BASES + MORE_BASES, [[]]),
    chosen([[word] for word in HUB], LLADA),
    chosen([[word] for word in DREAMS], DREAM),
    chosen(PUBLISHED, [[]]),
    st.builds(lambda words, launcher: [*words, *launcher], EMBEDDED_WORDS, st.sampled_from(LAUNCHERS)),
)


@pytest.fixture(autouse=True, scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What stands for the words in capitals; nothing is timed."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in MAKE:
        write_task(folder / "data", name)
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(100)))
    patch = pytest.MonkeyPatch()
    patch.setattr(estimate, "seconds_per_token", lambda *_: 1e-6)
    PLACES.update({"DATA": str(data), "FOLDER": str(folder / "data"), "EMBEDDED": str(EMBEDDED)})
    yield PLACES
    patch.undo()


PLACES: dict[str, str] = {}


def placed(word: str) -> str:
    key, sign, value = word.partition("=")
    head, slash, rest = value.partition("/")
    return f"{key}{sign}{PLACES.get(head, head)}{slash}{rest}"


def checked(words: Words) -> str:
    """What the user of a dry run reads: the plan, or the sentence."""
    words = [placed(word) for word in words]
    if any(w.startswith(("model=llada", "model=dream", "tasks=", "experiment=")) for w in words):
        words.append(f"tasks.data_dir={PLACES['FOLDER']}")
    words = [w for w in arguments([*words, "dry_run=true"]) if not w.startswith("hydra.run.dir=")]
    try:
        check_choices(words)
        plan = check_cell(composed(*words))
    except ValueError as error:
        text = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        text = refused(error, words)
    else:
        return describe(plan, "cell")
    assert len(text) > 15 and "\n" not in text and "Traceback" not in text and "object at 0x" not in text, (
        text
    )
    return text


def valid_words_dry_run(words: Words) -> None:
    said = checked(words)
    assert said.startswith("cell: checked, nothing run"), f"{words}: {said}"
    if "not on this disk" not in said:
        assert "time         shared: at most about" in said and "memory" in said


def broken_words_are_told(words: Words, key: str, value: str, add: bool) -> None:
    said = checked([*words, f"{'++' if add else ''}{key}={value}"])
    assert said.strip()


BROKEN: dict[str, Any] = {
    "key": st.sampled_from([*KEYS, *NO_KEYS]),
    "value": st.sampled_from(WRONG),
    "add": st.booleans(),
}
plain = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def leaves(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the schema."""
    for f in fields(schema):
        if is_dataclass(f.default_factory):
            yield from leaves(f.default_factory, f"{prefix}{f.name}.")
        elif not f.metadata.get("omegaconf_ignore"):
            yield f"{prefix}{f.name}"


def in_conf() -> set[str]:
    """Every key of conf/, those of the presets' classes included, and every preset as group=name."""
    found = {*leaves(RunConfig), "experiment"} - {"method", "tracker"}
    for group in GROUPS - {"hydra"}:
        for file in (CONF / group).glob("*.yaml"):
            found.add(f"{group}={file.stem}")
            if group in ("method", "tracker"):
                own = yaml.safe_load(file.read_text(encoding="utf-8"))
                found |= {f"{group}.{key}" for key in own if key != "_target_"}
    return found | {f"hydra/launcher={f.stem}" for f in (CONF / "hydra" / "launcher").glob("*.yaml")}


def test_every_key_and_preset_is_drawn() -> None:
    words = set(all_words())
    drawn = words | {word.partition("=")[0].lstrip("+") for word in words} | {"dry_run", "model.path"}
    assert sorted(in_conf() - drawn) == []


@settings(plain, max_examples=8)
@given(FEW_WORDS)
def test_valid_configs_dry_run(words: Words) -> None:
    valid_words_dry_run(words)


@settings(plain, max_examples=20)
@given(words=FEW_WORDS, **BROKEN)
def test_broken_configs_are_one_sentence(words: Words, key: str, value: str, add: bool) -> None:
    broken_words_are_told(words, key, value, add)


@pytest.mark.slow
@settings(plain, max_examples=30)
@given(ALL_WORDS)
def test_thirty_valid_configs_dry_run(words: Words) -> None:
    valid_words_dry_run(words)


@pytest.mark.slow
@settings(plain, max_examples=60)
@given(words=ALL_WORDS, **BROKEN)
def test_sixty_broken_configs_are_one_sentence(words: Words, key: str, value: str, add: bool) -> None:
    broken_words_are_told(words, key, value, add)


@pytest.mark.long
@settings(plain, max_examples=400)
@given(ALL_WORDS)
def test_four_hundred_valid_configs_dry_run(words: Words) -> None:
    valid_words_dry_run(words)


@pytest.mark.long
@settings(plain, max_examples=600)
@given(words=ALL_WORDS, **BROKEN)
def test_six_hundred_broken_configs_are_one_sentence(words: Words, key: str, value: str, add: bool) -> None:
    broken_words_are_told(words, key, value, add)
