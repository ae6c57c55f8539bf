"""From the composed YAML to typed values; the only place that reads the switches.

`load(cfg)` refuses unknown keys (also those added with +key=) and wrong types, then `RunConfig.recipe()`
turns the booleans into values for the pipeline's slots. `check_cell` finds what is wrong before weights are
read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllmq.calibration.prompts import read_prompts
from dllmq.calibration.states import CleanText, RandomMask, StateSampler, UniformTrajectory
from dllmq.calibration.values import MinMax, ValueScale
from dllmq.checkpoint.formats import EXPORTS, layout_of
from dllmq.diffusion import SamplerConfig, check_sampler
from dllmq.evaluation import benchmarks, task_data
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.task_settings import DEFAULT, apply_row, find, published
from dllmq.evaluation.tasks import check_code_execution, check_task_data, check_tasks, generates, runs_code
from dllmq.kernels.backends import find_backend
from dllmq.methods import FP
from dllmq.models.linear import BACKENDS
from dllmq.models.memory import MEMORY
from dllmq.numerics import Grid
from dllmq.recipe import FULL_PRECISION_BITS, AttentionGrids, Bits, Recipe, TokenWeight, uniform_weight
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ, EqualWeightSearch, alpha_grid
from dllmq.techniques.tmas import TMAS

EMBEDDED = Path(__file__).parent / "mini" / "weights"
GRANULARITIES = ("tensor", "head", "channel")
DTYPES = ("auto", "float32", "bfloat16")
VALUE_SCALES = ("minmax", "mse", "iaaq")
STATES: dict[str, type] = {"clean": CleanText, "random_mask": RandomMask, "uniform": UniformTrajectory}


@dataclass
class ModelSamplerFields:
    gen_length: int = 48
    steps: int = 48
    block_length: int = 16
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    remasking: str = "low_confidence"
    temperature: float = 0.0
    alg_temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3


@dataclass
class ModelFields:
    name: str = "mini"
    path: str | None = None
    dtype: str = "auto"
    default_bits: str = "w4a4"
    chat_template: bool = False
    add_bos: bool = False
    sampler: ModelSamplerFields = field(default_factory=ModelSamplerFields)


@dataclass
class CalibrationFields:
    states: str = "clean"
    num_states: int = 128
    num_prompts: int = 64
    batch_size: int = 16
    data: str | None = None
    shares: list[float] = field(default_factory=lambda: [0.3, 0.2, 0.2, 0.3])


@dataclass
class SamplerFields:
    gen_length: int = 48
    steps: int = 48
    block_length: int = 16
    cache: str = "none"
    threshold: float | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    alg_temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3


@dataclass
class TaskFields:
    names: list[str] = field(default_factory=list)
    data_dir: str | None = None
    settings: str = "default"
    num_fewshot: int | None = None
    chat_template: bool | None = None
    add_bos: bool | None = None


@dataclass
class EvalFields:
    limit: int | None = 200
    batch_size: int | str = 25
    eos_cut: str = "first"
    mc_num: str = "auto"
    mc_batch_size: int = 8
    allow_code_execution: bool = False
    fidelity_states: int = 400
    fidelity_prompts: int = 32


@dataclass
class RunConfig:
    """A run. Fields are the keys of conf/config.yaml, where each is explained with its allowed values."""

    model: ModelFields = field(default_factory=ModelFields)
    method: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationFields = field(default_factory=CalibrationFields)
    sampler: SamplerFields = field(default_factory=SamplerFields)
    tasks: TaskFields = field(default_factory=TaskFields)
    eval: EvalFields = field(default_factory=EvalFields)
    tracker: dict[str, Any] = field(default_factory=dict)
    tmas: bool = False
    cgq: bool = False
    iaaq: bool = False
    cgq_unmasked: float = 0.7
    cgq_masked: float = 1.0
    cgq_unmasked_confidence: str = "zero"
    iaaq_alpha_min: float = 0.8
    iaaq_alpha_step: float = 0.01
    value_scale: str = "minmax"
    value_granularity: str = "head"
    bits: str = "auto"
    group_size: int = -1
    act_group_size: int = -1
    symmetric: bool = False
    act_symmetric: bool = False
    attn_bits: str = "auto"
    backend: str = "auto"
    export: str | None = None
    device: str = "auto"
    memory: str = "auto"
    max_state_bytes: int | None = 2**34
    threads: int | None = None
    seed: int = 0
    resume: bool = True
    cache_dir: str | None = "outputs/.cache"
    name: str | None = None
    dry_run: bool = False
    # fields of SamplerConfig and EvalSettings that the user set: tasks.settings leaves them alone
    explicit: frozenset[str] = field(default=frozenset(), metadata={"omegaconf_ignore": True})

    @property
    def embedded(self) -> bool:
        return self.model.path is None

    @property
    def model_path(self) -> str:
        return str(EMBEDDED) if self.model.path is None else self.model.path

    def widths(self) -> Bits:
        """`bits`, auto resolved: the preset's, or w4a4 for a checkpoint put in the embedded model's place."""
        if self.bits != "auto":
            return Bits.parse(self.bits)
        own_checkpoint = self.model.name == "mini" and not self.embedded
        return Bits.parse("w4a4" if own_checkpoint else self.model.default_bits)

    def dtype(self) -> str:
        """`model.dtype`, auto resolved: float32 for the embedded model, bfloat16 otherwise."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.embedded else "bfloat16"

    def mc_num(self) -> int:
        """Monte-Carlo samples of a likelihood."""
        if self.eval.mc_num == "auto":
            return 8 if self.embedded else 128
        if not re.fullmatch("[0-9]+", self.eval.mc_num):
            raise ValueError(f"eval.mc_num={self.eval.mc_num} is not known; use auto or a positive integer.")
        return int(self.eval.mc_num)

    def sampler_config(self) -> SamplerConfig:
        """How tasks are answered. Calibration and fidelity use `made_exact()` of it: their states are those
        of the published process whatever approximates the answers, so that runs compare like with like."""
        return SamplerConfig(**vars(self.sampler))

    def approximations(self) -> dict[str, str]:
        """{task: "cache=dual, threshold=0.9"} of the tasks whose answers are decoded approximately."""
        found = {name: answer.sampler.approximations for name, answer in self.answers().items()}
        return {name: text for name, text in found.items() if text and generates(name)}

    @property
    def data_dir(self) -> Path | None:
        """Local files of published tasks."""
        return None if self.tasks.data_dir is None else Path(self.tasks.data_dir).expanduser()

    def answers(self) -> dict[str, EvalSettings]:
        """How each task is answered: the run's own settings, under them those of `tasks.settings`.

        Raises:
            ValueError: no such row for the model and a task, or settings that do not go together.
        """
        own = self.tasks
        base = EvalSettings(
            sampler=self.sampler_config(),
            batch_size=self.eval.batch_size,
            eos_cut=self.eval.eos_cut,
            mc_num=self.mc_num(),
            mc_batch_size=self.eval.mc_batch_size,
            chat_template=self.chat_template,
            add_bos=self.add_bos,
            num_fewshot=own.num_fewshot,
        )
        return {name: self._answer(name, base) for name in own.names}

    def _answer(self, name: str, base: EvalSettings) -> EvalSettings:
        """One task's; without a row, programs in a chat are taken out of the text around them."""
        row = find(self.tasks.settings, self.model.name, name)
        if row is None and base.chat_template and runs_code(name):
            whole = "none" if name == "humaneval" else base.until  # its stop strings would cut the program
            base = replace(base, postprocess="take_function", until=whole)
        return apply_row(row, base, self.explicit)

    @property
    def chat_template(self) -> bool:
        """Of the prompts of tasks (unless a row of tasks.settings has its own), calibration and fidelity."""
        own = self.tasks.chat_template
        return self.model.chat_template if own is None else own

    @property
    def add_bos(self) -> bool:
        """Likewise."""
        return self.model.add_bos if self.tasks.add_bos is None else self.tasks.add_bos

    def published(self) -> dict[str, list[dict[str, Any]]]:
        """{task: full-precision scores published for the model, each with its settings and source}."""
        base = replace(self, tasks=replace(self.tasks, settings=DEFAULT)).answers()
        found = {
            name: published(self.tasks.settings, self.model.name, name, base[name], self.explicit)
            for name in self.tasks.names
        }
        return {name: rows for name, rows in found.items() if rows}

    def states(self) -> StateSampler:
        """TMAS, or what `calibration.states` names; both are checked."""
        on = TMAS(tuple(self.calibration.shares))
        off = choose("calibration.states", self.calibration.states, {**STATES, "tmas": None})
        return on if self.tmas or off is None else off()

    def token_weight(self) -> TokenWeight:
        """CGQ or its off-state; its knobs are checked either way."""
        on = CGQ(self.cgq_unmasked, self.cgq_unmasked_confidence, self.cgq_masked)
        return on if self.cgq else uniform_weight

    def value_scale_of(self) -> tuple[str, Callable[[Grid], ValueScale]]:
        """IA-AQ, or what `value_scale` names: (name, what makes one per layer)."""
        choose("value_granularity", self.value_granularity, dict.fromkeys(GRANULARITIES))
        alphas = alpha_grid(self.iaaq_alpha_min, self.iaaq_alpha_step)
        choose("value_scale", self.value_scale, dict.fromkeys(VALUE_SCALES))
        if self.iaaq or self.value_scale == "iaaq":
            return "iaaq", partial(IAAQ, granularity=self.value_granularity, alphas=alphas)
        if self.value_scale == "mse":
            return "mse", partial(EqualWeightSearch, granularity=self.value_granularity, alphas=alphas)
        return "minmax", partial(MinMax, granularity=self.value_granularity)

    def recipe(self) -> Recipe:
        """The values of the pipeline's slots."""
        bits = self.widths()
        quantized = bits.activation != FULL_PRECISION_BITS
        inputs = Grid(bits.activation, self.act_group_size, self.act_symmetric) if quantized else None
        name, value_scale = self.value_scale_of()
        return Recipe(
            method=build("method", self.method),
            weights=Grid(bits.weight, self.group_size, self.symmetric),
            inputs=inputs,
            attention=AttentionGrids.parse(self.attn_bits, bits.activation),
            states=self.states(),
            token_weight=self.token_weight(),
            value_scale=value_scale,
            value_scale_name=name,
            num_states=self.calibration.num_states,
            batch_size=self.calibration.batch_size,
            sampler=self.sampler_config().made_exact(),
            seed=self.seed,
        )

    def axes(self) -> dict[str, Any]:
        """What tells the cells of a sweep apart; a method's knobs only where they are not the default."""
        method = str(self.method.get("_target_", "")).rpartition(".")[2].lower()
        solver = self.method.get("solver", "rtn")
        named = method if solver == "rtn" else f"{method}+{solver}"
        model = (
            self.model.name if self.model.path is None else f"{self.model.name}:{Path(self.model.path).name}"
        )
        return {
            "model": model,
            "method": named,
            "bits": "w16a16" if method == "fp" else str(self.widths()),
            "group_size": self.group_size,
            "act_group_size": self.act_group_size,
            "symmetric": self.symmetric,
            "act_symmetric": self.act_symmetric,
            "attn_bits": self.attn_bits,
            "value_granularity": self.value_granularity,
            "states": self.calibration.states,  # with tmas too: its twin differs in the switch alone
            "value_scale": self.value_scale,  # the same with iaaq
            "tmas": self.tmas,
            "cgq": self.cgq,
            "iaaq": self.iaaq,
            "backend": self.backend,
            "num_states": self.calibration.num_states,
            "num_prompts": self.calibration.num_prompts,
            "gen_length": self.sampler.gen_length,
            "steps": self.sampler.steps,
            "seed": self.seed,
        } | self._knobs()

    def _knobs(self) -> dict[str, Any]:
        """The techniques' and the method's fields that are not at their default, by name."""
        method, plain = build("method", self.method), RunConfig()
        names = ("cgq_unmasked", "cgq_masked", "cgq_unmasked_confidence", "iaaq_alpha_min", "iaaq_alpha_step")
        own = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}
        for group, of_group in _AXES_OF.items():
            mine, default = getattr(self, group), getattr(plain, group)
            own |= {n: getattr(mine, n) for n in of_group if getattr(mine, n) != getattr(default, n)}
        if self.calibration.shares != plain.calibration.shares:
            own["shares"] = " ".join(f"{share:g}" for share in self.calibration.shares)
        return own | {
            f.name: self.method[f.name]
            for f in fields(method)
            if f.name in self.method and f.name != "solver" and self.method[f.name] != f.default
        }

    def plain(self) -> dict[str, Any]:
        """The whole config as JSON values, `auto` resolved."""
        out: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(self))  # type: ignore[assignment]
        return out | {"bits": self.axes()["bits"]}

    def full_precision(self) -> RunConfig:
        """The same run without quantization: the reference of a sweep."""
        return replace(
            self, method={"_target_": "dllmq.methods.FP"}, tmas=False, cgq=False, iaaq=False, bits="auto"
        )

    def decoded_exactly(self) -> RunConfig:
        """The same run without cache and threshold."""
        block_length = self.sampler_config().made_exact().block_length
        off = replace(self.sampler, cache="none", threshold=None, block_length=block_length)
        return self if self.sampler_config().exact else replace(self, sampler=off)


def load(cfg: DictConfig) -> RunConfig:
    """A composed config as typed values.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    schema = OmegaConf.structured(RunConfig)
    _refuse_unknown(cfg, RunConfig, "")
    try:
        merged = OmegaConf.merge(schema, OmegaConf.to_container(cfg, resolve=True))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key, first = getattr(error, "full_key", None), str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{key}: {first}." if key else f"{first}.") from error
    assert isinstance(config, RunConfig)
    return replace(config, explicit=_explicit(cfg))


def _explicit(cfg: DictConfig) -> frozenset[str]:
    """Fields of the answers' settings that are no defaults (these are interpolations, auto or null)."""
    given: set[str] = set()
    for group in ("sampler", "eval", "tasks"):
        node = cfg.get(group) or {}
        given |= {
            str(key)
            for key in node
            if key not in _NOT_ANSWERS
            and not OmegaConf.is_interpolation(node, key)
            and node[key] not in (None, "auto")
        }
    return frozenset(given)


# Keys of eval and tasks that are no fields of EvalSettings, or that no row has.
_NOT_ANSWERS = (
    "limit", "batch_size", "allow_code_execution", "fidelity_states", "fidelity_prompts",
    "names", "data_dir", "settings",
)  # fmt: skip


def compose_plan(overrides: Sequence[str], stored: bool = False) -> Plan:
    """The checked plan of a run with these overrides, for entry points that Hydra does not start.

    Args:
        stored: a quantized folder is taken too, as in `check_cell`.

    Raises:
        ValueError: one sentence, whether Hydra refuses an override or check_cell the run.
    """
    check_choices(overrides)
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        try:
            cfg = compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            text = " ".join(str(error).partition("Config search path:")[0].split())
            raise ValueError(text) from error
    return check_cell(cfg, stored)


def check_choices(overrides: Sequence[str]) -> None:
    """Refuses a list or dict in the place of a preset's name, over which Hydra stumbles without a word.

    Raises:
        ValueError: naming the group.
    """
    groups = {entry.name for entry in files("dllmq.conf").iterdir() if entry.is_dir()}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups and value.strip().startswith(("[", "{")):
            raise ValueError(
                f"{key}={value} is a list or a dict, but {key} is the name of one preset: give a name, or "
                f"sweep over several with -m {key}=a,b."
            )


def preset_of(hub_id: str) -> str | None:
    """The option of the group `model` whose path is this hub id."""
    for file in sorted(files("dllmq.conf").joinpath("model").iterdir(), key=lambda f: f.name):
        if yaml.safe_load(file.read_text(encoding="utf-8"))["path"] == hub_id:
            return file.name.removesuffix(".yaml")
    return None


def _refuse_unknown(node: DictConfig, schema: Any, prefix: str) -> None:
    known = {f.name: f for f in fields(schema) if not f.metadata.get("omegaconf_ignore")}
    for key in node:
        if key not in known:
            raise ValueError(f"there is no key {prefix}{key!s}.{did_you_mean(str(key), known)}")
        default = known[str(key)].default_factory
        value = node._get_node(key)
        if is_dataclass(default) and isinstance(value, DictConfig):
            _refuse_unknown(value, default, f"{prefix}{key}.")


def did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    """ " Did you mean ...? Allowed: ...", to end a sentence with."""
    close = difflib.get_close_matches(word, list(known), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


def choose(key: str, value: str, table: Mapping[str, Any]) -> Any:
    """table[value], or one sentence that names the key and what is allowed."""
    if value not in table:
        raise ValueError(f"{key}={value} is not known.{did_you_mean(value, table)}")
    return table[value]


def build(key: str, node: Mapping[str, Any]) -> Any:
    """The dataclass that `_target_` names, from the node's other keys, types checked.

    Raises:
        ValueError: no such class, an unknown field, a wrong type, or what the class itself refuses.
    """
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    try:
        cls = get_class(str(node.get("_target_")))
    except Exception as error:
        raise ValueError(f"{key}._target_={node.get('_target_')} cannot be imported.") from error
    known = {f.name: f for f in fields(cls) if f.init} if is_dataclass(cls) else {}
    for name in arguments:
        if name not in known:
            raise ValueError(f"there is no key {key}.{name}.{did_you_mean(name, known)}")
    if not arguments:
        return cls()
    if any(isinstance(value, Mapping) for value in arguments.values()):
        raise ValueError(f"{key} takes no nested keys; its fields are {', '.join(known)}.")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(cls), arguments)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}.") from error
    return cls(**{k: v for k, v in OmegaConf.to_container(typed).items() if k in arguments})  # type: ignore[union-attr]


# Settings of the answers that are axes where they are not at their default.
_AXES_OF = {
    "tasks": ("settings", "num_fewshot", "chat_template", "add_bos"),
    "eval": ("eos_cut", "mc_num", "mc_batch_size", "limit"),
    "sampler": tuple(f.name for f in fields(SamplerFields) if f.name not in ("gen_length", "steps")),
}


# ------------------------------------------------------------------ checks before weights are read


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    config: RunConfig
    recipe: Recipe
    device: str
    parameters: int


def check_cell(cfg: DictConfig, stored: bool = False) -> Plan:
    """Everything that can be wrong with a run, found without reading weights.

    Args:
        stored: a quantized folder is taken too, to be run as it is; else it is refused.

    Raises:
        ValueError: one sentence.
    """
    from dllmq.models.loading import checkpoint_folder, is_hub_id
    from dllmq.pipeline import check_group_sizes

    config = load(cfg)
    _check_ranges(config)
    recipe = config.recipe()
    if config.export is not None:
        choose("export", config.export, {"null": None} | EXPORTS)
    build("tracker", config.tracker)
    check_tasks(config.tasks.names)
    answers = config.answers()
    check_code_execution(config.tasks.names, config.eval.allow_code_execution)
    check_task_data(config.tasks.names, answers, config.data_dir)
    choose("model.dtype", config.model.dtype, dict.fromkeys(DTYPES))
    choose("backend", config.backend, dict.fromkeys(BACKENDS))
    choose("memory", config.memory, dict.fromkeys(MEMORY))
    _check_calibration(config, recipe)
    device = device_of(config)
    if config.dry_run and config.model.path is not None and is_hub_id(config.model.path):
        return Plan(config, recipe, device, 0)  # a dry run downloads nothing
    model = _checked_skeleton(checkpoint_folder(config.model_path), stored)
    check_sampler(model.config, recipe.sampler)
    for answer in answers.values():
        check_sampler(model.config, answer.sampler)
    check_group_sizes(model, recipe)
    _check_backend(config, recipe, device, model)
    _check_export(config, recipe, model)
    return Plan(config, recipe, device, sum(p.numel() for p in model.parameters()))


def _checked_skeleton(folder: Path, stored: bool) -> Any:
    """The folder's model without weights, after comparing config.json and headers; see `check_cell`."""
    from dllmq.models.loading import check_tensors, read_config, skeleton, weight_files
    from dllmq.models.quantized_loading import check_folder
    from dllmq.models.stored import read_stored

    found = read_stored(folder) if (folder / "config.json").is_file() else None
    if found is None:
        model = skeleton(*read_config(folder))
        check_tensors(weight_files(folder), {name: p.shape for name, p in model.state_dict().items()})
        return model
    if not stored:
        raise ValueError(
            f"model path {folder} is quantized already; give the full-precision checkpoint it was made from, "
            "or score the folder as it is with python -m dllmq.evaluation.plugin."
        )
    return check_folder(folder, found).model


def _check_ranges(config: RunConfig) -> None:
    for node, name, least in (
        (config.eval, "batch_size", 1),
        (config.calibration, "num_states", 1),
        (config.calibration, "num_prompts", 1),
        (config.calibration, "batch_size", 1),
        (config.eval, "fidelity_states", 0),
        (config.eval, "fidelity_prompts", 1),
        (config.eval, "limit", 1),
        (config, "max_state_bytes", 0),
    ):
        value = getattr(node, name)
        if isinstance(value, int) and value < least:
            group = {id(config.eval): "eval.", id(config.calibration): "calibration."}.get(id(node), "")
            raise ValueError(f"{group}{name}={value} is too small; it must be at least {least}.")
    if isinstance(config.eval.batch_size, str) and config.eval.batch_size != "auto":
        raise ValueError(
            f"eval.batch_size={config.eval.batch_size} is not known; it is a positive integer, or auto."
        )
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads={config.threads} is too small; it must be at least 1, or null.")
    if not 0 <= config.seed < 2**62:
        raise ValueError(f"seed={config.seed} is out of range; it is an integer from 0 to 2^62.")
    if config.group_size < -1:
        raise ValueError(
            f"group_size={config.group_size} is not known; it is -1 (one scale per output channel), 0 "
            "(one per tensor) or a positive number of input channels."
        )
    if config.act_group_size < -1 or config.act_group_size == 0:
        raise ValueError(
            f"act_group_size={config.act_group_size} is not known; it is -1 (one scale per token) or a "
            "positive number of its channels."
        )


def _check_calibration(config: RunConfig, recipe: Recipe) -> None:
    """Tokens that weigh, enough prompts in the file, and enough states for TMAS, which takes none twice."""
    c = config.calibration
    weightless = isinstance(recipe.token_weight, CGQ) and recipe.token_weight.weightless_without_masks
    if weightless and recipe.states.name == "clean" and recipe.method.needs:
        raise ValueError(
            "cgq_unmasked=0 weighs every token of clean text 0: calibrate on masked states (tmas=true, or "
            "calibration.states=random_mask or uniform), or give a positive cgq_unmasked."
        )
    if c.data is not None:
        if not Path(c.data).is_file():
            raise ValueError(f"calibration.data={c.data} is not a file; give a JSONL file, or null.")
        read_prompts(Path(c.data), c.num_prompts + config.eval.fidelity_prompts)
    steps = min(config.sampler.steps, config.sampler.gen_length)  # a step that commits nothing is no state
    if (config.tmas or c.states == "tmas") and c.num_states > c.num_prompts * steps:
        raise ValueError(
            f"calibration.num_states={c.num_states}, but {c.num_prompts} prompts of {steps} steps have "
            f"{c.num_prompts * steps} states: ask for fewer, or raise calibration.num_prompts."
        )


def _check_backend(config: RunConfig, recipe: Recipe, device: str, model: Any) -> None:
    """Whether the packed backend, where it is asked for, has a kernel for every linear of the model."""
    if config.backend != "packed" or isinstance(recipe.method, FP):
        return
    assert recipe.weights is not None
    for name in (name for row in model.topology.groups for name in row.linears):
        O, I = getattr(model.blocks[0], name).weight.shape
        if find_backend(device.split(":")[0], recipe.weights, recipe.inputs, O, I) is None:
            raise ValueError(
                f"backend=packed has no kernel on {device} for {name} with its {I} inputs at these bits, "
                f"group_size={config.group_size} and act_group_size={config.act_group_size}; use "
                "backend=fake or auto."
            )


def _check_export(config: RunConfig, recipe: Recipe, model: Any) -> None:
    """Whether the export's format can hold the model's grids and sizes."""
    if config.export is None or isinstance(recipe.method, FP):
        return
    assert recipe.weights is not None
    names = [name for row in model.topology.groups for name in row.linears]
    shapes = {name: getattr(model.blocks[0], name).weight.shape for name in names}
    sizes = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
    reorders = getattr(recipe.method, "act_order", False) and not getattr(
        recipe.method, "static_groups", False
    )
    uses_gptq = getattr(recipe.method, "solver", "gptq") == "gptq"
    ordered = reorders and uses_gptq and recipe.weights.group_size > 0
    layout_of(config.export, recipe.weights, recipe.inputs, sizes, ordered)


def device_of(config: RunConfig) -> str:
    """The device, `auto` resolved.

    Raises:
        ValueError: unknown, or not there.
    """
    import torch

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"device={config.device} is not known; it is auto, cpu, cuda or cuda:<n>.")
    if config.device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={config.device}, but torch sees no CUDA device here; use device=cpu or auto."
        )
    count, index = torch.cuda.device_count(), int(config.device.partition(":")[2] or 0)
    if index >= count:
        raise ValueError(f"device={config.device}, but the CUDA devices here are 0 to {count - 1}.")
    return config.device


# ------------------------------------------------------------------ identity

# Keys that change no number, or that are part of the fingerprint resolved (device, threads).
_NEUTRAL = (
    "tracker", "resume", "name", "dry_run", "device", "threads", "cache_dir", "memory", "max_state_bytes",
    "export",
)  # fmt: skip


# What is read of a checkpoint folder (not its README): config, weights, tokenizer.
READ = (".json", ".safetensors", ".jinja", ".txt", ".model")


def fingerprint(config: RunConfig, device: str) -> str:
    """sha256 over all that affects the numbers: config, weights, tokenizer, data, code, device, threads."""
    return fingerprint_of(fingerprint_parts(config, device))


def fingerprint_of(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_parts(config: RunConfig, device: str) -> dict[str, Any]:
    """What the fingerprint is of, as JSON values: the config's own keys under "config"."""
    values = {k: v for k, v in config.plain().items() if k not in _NEUTRAL}
    values["tasks"] = {k: v for k, v in values["tasks"].items() if k != "data_dir"}  # what is in it counts
    data = file_digest(Path(config.calibration.data)) if config.calibration.data else None
    parts = identity(config, device) | {"config": values, "data": data, "tasks": _tasks_identity(config)}
    if config.eval.batch_size == "auto":
        from dllmq.models.memory import total_memory

        parts["memory"] = total_memory(device)  # what settles the size
    return parts


def _tasks_identity(config: RunConfig) -> dict[str, Any]:
    """What scores depend on beside the model: lm-eval, each task's settings and its local files."""
    answers = config.answers()
    return {
        "lm-eval": version("lm-eval"),
        "settings": {name: asdict(answer) for name, answer in answers.items()},
        "data": {
            name: task_data.digests(name, answers[name].num_fewshot, config.data_dir)
            for name in config.tasks.names
            if name in benchmarks.names()
        },
    }


def identity(config: RunConfig, device: str) -> dict[str, Any]:
    """What any forward of the full-precision model depends on: weights, tokenizer, dtype, code, device."""
    import torch

    from dllmq.models.loading import checkpoint_folder

    folder = checkpoint_folder(config.model_path)
    return {
        "weights": {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.suffix in READ},
        "dtype": config.dtype(),
        "chat_template": config.chat_template,
        "code": code_digest(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def file_digest(path: Path, whole_below: int = 2**26) -> str:
    """sha256 of a file; of a large one (a weight shard): its size, time of change and first MiB."""
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read() if stat.st_size < whole_below else file.read(2**20))
    if stat.st_size >= whole_below:
        digest.update(f"{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """sha256 of the source files that numbers come from (not the report's), as they were when first asked.

    A file that is edited while a sweep runs does not change the code that runs.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        inside = file.relative_to(package).parts
        if file.suffix in (".py", ".yaml") and inside[0] not in (
            "report",
            "run.py",
            "generate.py",
            "status.py",
            "workers.py",
            "team.py",
            "interrupt.py",
            "locks.py",
            "cache.py",
            "conf",
            "__pycache__",
        ):
            digest.update("/".join(inside).encode() + file.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------ folders


def slug(text: str, limit: int = 100) -> str:
    """A folder name for a list of overrides: readable, and distinct where it had to be cut."""
    clean = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text).strip("_.") or "default"
    if len(clean) <= limit:
        return clean
    return f"{clean[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sweep_folder(overrides: list[str]) -> str:
    """outputs/<name>, or outputs/<the overrides> so that the same command finds its folder again."""
    named = [o.partition("=")[2] for o in overrides if o.startswith("name=")]
    ignored = ("name=", "resume=", "dry_run=", "threads=", "cache_dir=", "tracker=", "hydra.", "hydra/")
    text = "_".join(o for o in overrides if not o.startswith(ignored))
    experiment = [o.partition("=")[2] for o in overrides if o.startswith(("experiment=", "+experiment="))]
    if not named and experiment and len([o for o in overrides if not o.startswith(ignored)]) == 1:
        named = experiment
    return os.path.join("outputs", slug(named[-1] if named and named[-1] != "null" else text))


def cell_name(override_dirname: str | None) -> str:
    """A cell's folder: its overrides, top-level keys first, so that these survive where it is cut."""
    parts = re.split(r",(?=[A-Za-z_.]+=)", override_dirname or "")
    return slug(",".join(sorted(parts, key=lambda part: "." in part.partition("=")[0])))


OmegaConf.register_new_resolver("default", lambda value: value, replace=True)
OmegaConf.register_new_resolver("cell_name", cell_name, replace=True)
