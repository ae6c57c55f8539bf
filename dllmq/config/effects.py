"""Keys without effect in a run, each with its reason: what a dry run and a record call "no effect".

The switches are told by `Recipe.inert()`. Here are the keys beside them, where they were set: a value that is
the default says nothing, and a line about it would be noise.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from dllmq.config.schema import RunConfig, SamplerFields
from dllmq.evaluation.tasks import generates, published, runs_code
from dllmq.methods import FP
from dllmq.recipe import Recipe
from dllmq.techniques.cgq import CGQ

Reasons = dict[str, str]  # key -> why it has no effect, whether it was set or not


def inert(config: RunConfig, recipe: Recipe) -> list[str]:
    """ "calibration.states: tmas=true takes states of its own" and the like, the recipe's switches first."""
    fp = isinstance(recipe.method, FP)
    reasons = _of_tasks(config, fp) | _of_presets(config)
    fidelity = config.eval.fidelity_states > 0
    reasons |= _of_method(config, recipe, fidelity)
    thresholds = {a.sampler.threshold for name, a in config.answers().items() if generates(name)}
    return recipe.inert() + _told(config, reasons) + _unreached(thresholds)


def inert_in_generation(config: RunConfig, recipe: Recipe, stored: bool) -> list[str]:
    """The same of `dllmq.generate`, which answers a prompt, no task, and measures and records nothing.

    Args:
        stored: the model is quantized already: its linears have a backend, whatever the method.
    """
    sampler = config.sampler_config()
    reasons = _of_presets(config) | _of_method(config, recipe, fidelity=False) | _ONE_PROMPT
    if stored:
        reasons.pop("backend", None)
    if not sampler.deterministic:
        reasons.pop("seed", None)
    elif "seed" in reasons:
        reasons["seed"] += ", and the sampler draws nothing"
    return recipe.inert() + _told(config, reasons) + _unreached({sampler.threshold})


def _told(config: RunConfig, reasons: Reasons) -> list[str]:
    return [f"{key}: {why}" for key, why in reasons.items() if is_set(config, key)]


def is_set(config: RunConfig, key: str) -> bool:
    """Whether a key has another value than the default's; of model and sampler, the model preset's."""
    group, _, name = key.rpartition(".")
    if group == "method":
        return bool(config.method.get(name, False))
    if group == "sampler":
        default = getattr(config.model.sampler, name, getattr(SamplerFields(), name))
        return bool(getattr(config.sampler, name) != default)
    if group.startswith("model"):
        return bool(_value(config, key) != _preset(config.model.name).get(key, _value(config, key)))
    return bool(_value(config, key) != _value(RunConfig(), key))


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@cache
def _preset(name: str) -> dict[str, Any]:
    """{"model.default_bits": ...} of a model's preset, its sampler's fields included; {} for another name."""
    file = files("dllmq.conf").joinpath("model", f"{name}.yaml")
    if not file.is_file():
        return {}
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    own = {f"model.sampler.{k}": v for k, v in values.pop("sampler").items() if not str(v).startswith("${")}
    return own | {f"model.{key}": value for key, value in values.items()}


_FULL_PRECISION: Reasons = (
    dict.fromkeys(
        (
            *("bits", "group_size", "act_group_size", "symmetric", "act_symmetric", "attn_bits", "backend"),
            *("cgq_unmasked", "cgq_masked", "cgq_unmasked_confidence", "iaaq_alpha_min", "iaaq_alpha_step"),
            *("value_granularity", "max_state_bytes"),
        ),
        "full precision quantizes nothing",
    )
    | dict.fromkeys(
        [
            *(f"calibration.{k}" for k in ("num_states", "num_prompts", "batch_size", "data", "shares")),
            "seed",
        ],
        "full precision is not calibrated",
    )
    | dict.fromkeys(
        ("eval.fidelity_states", "eval.fidelity_prompts"), "fidelity is measured to full precision"
    )
    | {"export": "full precision is the checkpoint itself, so nothing is exported"}
)


_ONE_PROMPT: Reasons = dict.fromkeys(
    (
        *("eval.limit", "eval.batch_size", "eval.mc_num", "eval.mc_batch_size", "eval.allow_code_execution"),
        *("eval.fidelity_states", "eval.fidelity_prompts"),
        *("tasks.settings", "tasks.num_fewshot", "tasks.data_dir"),
    ),
    "one prompt is answered, no task",
) | dict.fromkeys(("name", "resume", "dry_run"), "nothing is recorded")


def _of_method(config: RunConfig, recipe: Recipe, fidelity: bool) -> Reasons:
    if isinstance(recipe.method, FP):
        return dict(_FULL_PRECISION)
    return _of_quantizing(config, recipe) | _of_calibration(config, recipe, fidelity)


def _of_quantizing(config: RunConfig, recipe: Recipe) -> Reasons:
    """Knobs of what is off."""
    reasons: Reasons = {}
    if not isinstance(recipe.token_weight, CGQ):
        knobs = ("cgq_unmasked", "cgq_masked", "cgq_unmasked_confidence")
        reasons |= dict.fromkeys(knobs, "cgq=false weighs every token alike")
    elif recipe.states.name == "clean":
        reasons["cgq_masked"] = "clean text has no masked token"
    if recipe.attention.V is None:
        reasons["value_granularity"] = "V is not quantized"
    if recipe.attention.V is None or recipe.value_scale_name == "minmax":
        why = "no scale of V is searched (iaaq=true and value_scale=mse do, where V is quantized)"
        reasons |= dict.fromkeys(("iaaq_alpha_min", "iaaq_alpha_step"), why)
    if config.iaaq and config.value_scale == "mse":
        reasons["value_scale"] = "iaaq=true chooses V's scale"
    if recipe.inputs is None:
        reasons |= dict.fromkeys(("act_group_size", "act_symmetric"), "inputs are full precision (a16)")
    if config.group_size <= 0:
        reasons["method.static_groups"] = f"group_size={config.group_size} has no groups along a row"
    return reasons


def _of_calibration(config: RunConfig, recipe: Recipe, fidelity: bool) -> Reasons:
    """What a method that reads no states, TMAS, and fidelity that is left out make pointless."""
    c, method = config.calibration, type(recipe.method).__name__
    reasons: Reasons = {}
    if config.tmas and c.states not in ("clean", "tmas"):
        reasons["calibration.states"] = "tmas=true takes states of its own"
    if recipe.states.name != "tmas":
        reasons["calibration.shares"] = "only TMAS divides its states among blocks of the trajectory"
    if not recipe.reads_states:
        unread = ["calibration.num_states", "calibration.shares", "seed", "max_state_bytes"]
        unread += [] if c.data is not None and fidelity else ["calibration.num_prompts"]
        unread += [] if fidelity else ["calibration.data", "calibration.batch_size"]
        reasons |= dict.fromkeys(unread, f"{method} reads no calibration states")
    if not fidelity:
        reasons["eval.fidelity_prompts"] = "eval.fidelity_states=0 leaves fidelity out"
    return reasons


def _of_tasks(config: RunConfig, fp: bool) -> Reasons:
    """Keys of what none of the tasks does."""
    names, reasons = config.tasks.names, Reasons()
    if not any(map(generates, names)):
        unused = ["sampler.cache", "sampler.threshold", "eval.eos_cut", "eval.batch_size"]
        if fp:  # calibration and fidelity denoise, too
            unused += [f"sampler.{f.name}" for f in fields(SamplerFields) if f.name != "cfg_scale"]
        reasons |= dict.fromkeys(unused, "no task generates its answers")
    if all(map(generates, names)):
        unused = ["eval.mc_num", "eval.mc_batch_size"]
        reasons |= dict.fromkeys(unused, "no task is scored by likelihoods")
    if not any(map(runs_code, names)):
        reasons["eval.allow_code_execution"] = "no task runs generated programs"
    if not any(map(published, names)):
        reasons["tasks.data_dir"] = "the tasks' problems are generated, not read"
    return reasons


def _of_presets(config: RunConfig) -> Reasons:
    """Values of a model's preset that another key stands in for."""
    model, own, reasons = config.model, config.tasks, Reasons()
    if config.bits != "auto":
        reasons["model.default_bits"] = f"bits={config.bits} is given"
    elif str(config.widths()) != model.default_bits:
        reasons["model.default_bits"] = "it is the embedded model's; give bits for the one of model.path"
    for name in ("chat_template", "add_bos"):
        if getattr(own, name) is not None:
            reasons[f"model.{name}"] = f"tasks.{name}={str(getattr(own, name)).lower()} is given"
    if config.chat_template and all(answer.chat_template for answer in config.answers().values()):
        why = "a chat template brings its own BOS"
        reasons |= {"tasks.add_bos": why, "model.add_bos": why}
    for name, value in vars(model.sampler).items():
        if getattr(config.sampler, name) != value:
            reasons[f"model.sampler.{name}"] = f"sampler.{name}={getattr(config.sampler, name)} is given"
    return reasons


def _unreached(thresholds: set[float | None]) -> list[str]:
    """Thresholds that no confidence reaches."""
    return [
        f"sampler.threshold: no confidence reaches {value:g}, so a step commits one token, the most confident"
        for value in sorted(v for v in thresholds if v is not None and v > 1)
    ]
