"""What can be wrong with a run, found before a weight is read: `check_cell`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dllmq.calibration.prompts import read_prompts
from dllmq.checkpoint.formats import EXPORTS, layout_of
from dllmq.config.effects import inert, inert_in_generation
from dllmq.config.loading import load
from dllmq.config.schema import DTYPES, RunConfig
from dllmq.config.values import build, choose, naming_group
from dllmq.diffusion import check_sampler
from dllmq.evaluation.tasks import check_code_execution, check_task_data, check_tasks
from dllmq.kernels.backends import find_backend
from dllmq.methods import FP
from dllmq.models.linear import BACKENDS
from dllmq.models.memory import MEMORY
from dllmq.models.tokenizer import check_chat_template
from dllmq.recipe import Recipe
from dllmq.techniques.cgq import CGQ


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    config: RunConfig
    recipe: Recipe
    device: str
    parameters: int

    def inert(self) -> list[str]:
        """Keys without effect in this run, each with its reason."""
        return inert(self.config, self.recipe)

    def inert_in_generation(self, stored: bool) -> list[str]:
        """The same where `dllmq.generate` answers a prompt; stored: the model is quantized already."""
        return inert_in_generation(self.config, self.recipe, stored)


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
    if (count := getattr(recipe.method, "n_grid", 1)) > 1000:
        raise ValueError(f"method.n_grid={count} is too large; it must be at most 1000.")
    _check_cache_dir(config)
    device = device_of(config)
    if config.dry_run and config.model.path is not None and is_hub_id(config.model.path):
        return Plan(config, recipe, device, 0)  # a dry run downloads nothing
    folder = checkpoint_folder(config.model_path)
    model = _checked_skeleton(folder, stored)
    _check_prompts(config, folder)
    for sampler in (recipe.sampler, *(answer.sampler for answer in answers.values())):
        with naming_group("sampler", vars(config.sampler)):
            check_sampler(model.config, sampler)
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


# Least value, and one beyond which there is no run: a slip of the finger.
_RANGES = {
    "calibration.num_states": (1, 10**6),
    "calibration.num_prompts": (1, 10**6),
    "calibration.batch_size": (1, 10**5),
    "eval.batch_size": (1, 10**5),
    "eval.fidelity_states": (0, 10**6),
    "eval.fidelity_prompts": (1, 10**6),
    "eval.limit": (1, None),
    "eval.mc_batch_size": (1, 10**5),
    "max_state_bytes": (0, None),
    "threads": (1, 1024),
    "sampler.gen_length": (1, 10**5),
    "sampler.steps": (1, 10**5),
    "sampler.temperature": (0, 100),
    "sampler.cfg_scale": (0, 100),
    "sampler.alg_temp": (0, 100),
    "sampler.top_k": (1, 10**6),
    "tasks.num_fewshot": (0, 1000),
}


def _check_ranges(config: RunConfig) -> None:
    for key, (least, most) in _RANGES.items():
        group, _, name = key.rpartition(".")
        value = getattr(getattr(config, group) if group else config, name)
        if isinstance(value, int | float) and value < least:
            raise ValueError(f"{key}={value} is too small; it must be at least {least}.")
        if isinstance(value, int | float) and most is not None and value > most:
            raise ValueError(f"{key}={value} is too large; it must be at most {most}.")
    if isinstance(config.eval.batch_size, str) and config.eval.batch_size != "auto":
        raise ValueError(
            f"eval.batch_size={config.eval.batch_size} is not known; it is a positive integer, or auto."
        )
    if not 0 <= config.seed < 2**62:
        raise ValueError(f"seed={config.seed} is out of range; it is an integer from 0 to 2^62 - 1.")
    if 1000 < max(config.cgq_unmasked, config.cgq_masked) < float("inf"):
        raise ValueError(
            f"cgq_unmasked={config.cgq_unmasked:g} and cgq_masked={config.cgq_masked:g}: an indicator is "
            "at most 1000; the paper's are 0.7 and 1."
        )
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


def _check_cache_dir(config: RunConfig) -> None:
    place = Path(config.cache_dir or ".").expanduser().absolute()
    try:
        while not place.exists():
            place = place.parent
    except OSError:
        return  # not to be entered: the cache warns, and the run goes on
    if not place.is_dir():
        raise ValueError(
            f"cache_dir={config.cache_dir} cannot be made, {place} is a file: give a folder, or null."
        )


def _check_prompts(config: RunConfig, folder: Path) -> None:
    """Whether the tokenizer's files have the chat template and the BOS token that are asked for."""
    if config.chat_template or any(answer.chat_template for answer in config.answers().values()):
        check_chat_template(folder)
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    try:
        known = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    except (OSError, ValueError):
        return  # reading the tokenizer says what is wrong with it
    has_bos = any(isinstance(values, dict) and values.get("bos_token") for values in known)
    if known and config.add_bos and not config.chat_template and not has_bos:
        raise ValueError(
            f"add_bos=true, but the tokenizer in {folder} has no BOS token: set tasks.add_bos=false."
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
    if _scatters_groups(recipe):
        raise ValueError(
            "backend=packed has no kernel for the scattered groups of method.act_order=true: add "
            "method.static_groups=true, or use backend=fake or auto."
        )
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
    layout_of(config.export, recipe.weights, recipe.inputs, sizes, _scatters_groups(recipe))


def _scatters_groups(recipe: Recipe) -> bool:
    """Whether a group's columns are no neighbours: GPTQ's act_order with groups fitted on the way."""
    assert recipe.weights is not None
    reorders = getattr(recipe.method, "act_order", False) and not getattr(
        recipe.method, "static_groups", False
    )
    uses_gptq = getattr(recipe.method, "solver", "gptq") == "gptq"
    return bool(reorders and uses_gptq and recipe.weights.group_size > 0)


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
