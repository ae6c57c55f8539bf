"""A run's config, typed: the keys of conf/config.yaml, and what they mean for the pipeline's slots.

The only place that reads the switches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dllmq.calibration.states import CleanText, RandomMask, StateSampler, UniformTrajectory
from dllmq.calibration.values import MinMax, ValueScale
from dllmq.config.values import build, choose, naming_group
from dllmq.diffusion import SamplerConfig
from dllmq.evaluation.settings import EvalSettings
from dllmq.evaluation.task_settings import DEFAULT, apply_row, find, published
from dllmq.evaluation.tasks import generates, runs_code
from dllmq.methods import Method
from dllmq.numerics import Grid
from dllmq.recipe import FULL_PRECISION_BITS, AttentionGrids, Bits, Recipe, TokenWeight, uniform_weight
from dllmq.techniques.cgq import CGQ
from dllmq.techniques.iaaq import IAAQ, EqualWeightSearch, alpha_grid
from dllmq.techniques.tmas import TMAS

EMBEDDED = Path(__file__).parent.parent / "mini" / "weights"
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
        try:
            return Bits.parse("w4a4" if own_checkpoint else self.model.default_bits)
        except ValueError as error:
            raise ValueError(f"model.default_{error}") from error

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
        if len(self.eval.mc_num) > 6:  # nothing converges slower
            raise ValueError(f"eval.mc_num={self.eval.mc_num:.40} is too large; it must be below 1000000.")
        return int(self.eval.mc_num)

    def sampler_config(self) -> SamplerConfig:
        """How tasks are answered. Calibration and fidelity use `made_exact()` of it: their states are those
        of the published process whatever approximates the answers, so that runs compare like with like."""
        with naming_group("sampler", vars(self.sampler)):
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
        with (
            naming_group("sampler", vars(self.sampler)),
            naming_group("eval", vars(self.eval)),
            naming_group("tasks", vars(own)),
        ):
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
        method = build("method", self.method)
        if not isinstance(method, Method):
            raise ValueError(f"method._target_={self.method['_target_']} is no method: see docs/extend.md.")
        return Recipe(
            method=method,
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
        sampler = self.sampler_config()
        if sampler.exact:
            return self
        block_length = sampler.made_exact().block_length
        off = replace(self.sampler, cache="none", threshold=None, block_length=block_length)
        freed = {"block_length"} if sampler.dream else set()  # Dream's has no blocks: each task's gen_length
        return replace(self, sampler=off, explicit=self.explicit - freed)


# Settings of the answers that are axes where they are not at their default.
_AXES_OF = {
    "tasks": ("settings", "num_fewshot", "chat_template", "add_bos"),
    "eval": ("eos_cut", "mc_num", "mc_batch_size", "limit"),
    "sampler": tuple(f.name for f in fields(SamplerFields) if f.name not in ("gen_length", "steps")),
}
