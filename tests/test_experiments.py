"""The presets in conf/experiment: cells are checked as a sweep checks them, and the command line wins."""

import re
from functools import cache
from pathlib import Path

import pytest
from composed import CONF, composed
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from tiny_checkpoint import save_checkpoint

from dllmq.config import cell_name, check_cell
from dllmq.report.callback import cells

PRESETS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ELSEWHERE = ("model=llada_8b_base", "tasks=mini_choice", "eval.limit=7", "seed=5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for every group size that a preset names."""
    folder = tmp_path_factory.mktemp("wide") / "LLaDA-8B-Base"
    return save_checkpoint(folder, d_model=128, mlp_hidden_size=256)


@cache
def listed(*overrides: str) -> list[list[str]]:
    """The cells of `python -m dllmq.run -m <overrides>`."""
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return cells(hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN))


def test_there_are_presets_and_the_config_names_each() -> None:
    (line,) = re.findall(r"- experiment: null +# (.*)", (CONF / "config.yaml").read_text())
    assert sorted(line.split(" | ")) == PRESETS and "ablation" in PRESETS


def test_the_ablation_is_the_papers() -> None:
    """{AWQ, GPTQ} x {TMAS} x {CGQ} x {IA-AQ} on three calibration seeds."""
    sweep = listed("experiment=ablation")
    assert len(sweep) == len({tuple(cell) for cell in sweep}) == 3 * 2 * 2 * 2 * 2
    switches = {name: set() for name in ("seed", "method", "tmas", "cgq", "iaaq")}
    for cell in sweep:
        for name, _, value in (override.partition("=") for override in cell):
            switches.get(name, set()).add(value)
    assert switches == {
        "seed": {"0", "1", "2"},
        "method": {"gptq", "awq"},
        "tmas": {"True", "False"},
        "cgq": {"True", "False"},
        "iaaq": {"True", "False"},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_cells_have_folders_of_their_own(preset: str) -> None:
    sweep = listed(f"experiment={preset}")
    names = {cell_name(",".join(o for o in cell if not o.startswith("experiment="))) for cell in sweep}
    assert len(names) == len(sweep)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_of_a_preset_passes_the_check(preset: str) -> None:
    for cell in listed(f"experiment={preset}"):
        plan = check_cell(composed(*cell))
        assert {"mini_gsm"} <= set(plan.config.tasks.names) <= {"mini_gsm", "mini_choice"}, cell
        assert plan.config.embedded, cell
        assert not [line for line in plan.recipe.inert() if not line.startswith("cgq: clean text")], cell


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_line_wins_over_a_preset(preset: str, checkpoint: Path) -> None:
    """Another checkpoint, other tasks, limits and seeds; what the preset sweeps stays swept."""
    own = (f"experiment={preset}", *ELSEWHERE, f"model.path={checkpoint}")
    sweep, plain = listed(*own), listed(f"experiment={preset}")
    seeds = len({o for cell in plain for o in cell if o.startswith("seed=")}) or 1
    assert len(sweep) == len(plain) // seeds
    for cell in sweep:
        config = check_cell(composed(*cell)).config
        assert (config.model.name, config.model.path) == ("llada_8b_base", str(checkpoint))
        assert (config.tasks.names, config.eval.limit, config.seed) == (["mini_choice"], 7, 5)
        assert config.sampler.gen_length == config.model.sampler.gen_length == 256


@pytest.mark.parametrize(
    "override", ["tmas=false", "cgq_unmasked=0.35", "method=awq", "bits=w3a4", "eval.limit=null"]
)
def test_one_value_on_the_command_line_replaces_the_presets(override: str) -> None:
    sweep = listed("experiment=sensitivity", override)
    key, _, value = override.partition("=")
    for cell in sweep:
        config = check_cell(composed(*cell)).config
        found = {"method": config.axes()["method"], "eval.limit": config.eval.limit, "bits": config.bits}
        got = found[key] if key in found else getattr(config, key)
        assert str(got).lower() == {"null": "none"}.get(value, value)
    assert len(sweep) == 3  # seeds
