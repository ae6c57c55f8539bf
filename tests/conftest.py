"""For every test: shapes are checked, caches lie in a temporary folder, no network, the same seeds."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything of dllmq is imported, so that every annotation of every module is checked by beartype.
# Programs that a test starts run without the hook, as a user's do.
assert "dllmq" not in sys.modules, (
    "dllmq was imported before tests/conftest.py: its shapes would go unchecked"
)
if CHECKED := find_spec("beartype") is not None:  # a GPU machine may lack it; the dev extra brings it
    install_import_hook("dllmq", "beartype.beartype")

# Libraries read these at import, programs that a test starts inherit them.
_home = Path(tempfile.mkdtemp(prefix="dllmq-tests-"))
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # tiny tensors: two threads mostly wait for each other
}.items():
    os.environ.setdefault(name, value)
for name in (
    "HF_HOME",
    "WANDB_DIR",
    "WANDB_CACHE_DIR",
    "WANDB_DATA_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_ARTIFACT_DIR",
):
    os.environ[name] = str(_home / name.lower())
    Path(os.environ[name]).mkdir()
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "WANDB_API_KEY", "WANDB_RUN_ID"):
    os.environ.pop(name, None)
os.environ["NETRC"] = str(_home / "netrc")  # wandb looks for a key in ~/.netrc otherwise

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch does not do

# Examples are the same in every run; a property that fails here fails everywhere.
settings.register_profile("dllmq", derandomize=True, deadline=None)
settings.load_profile("dllmq")


def pytest_report_header() -> str:
    return f"shapes are {'checked' if CHECKED else 'NOT checked: beartype is not installed'}"


def pytest_unconfigure() -> None:
    shutil.rmtree(_home, ignore_errors=True)


# Parts of node ids in the order they start in: what takes long and is begun last leaves other workers idle.
LONGEST = (
    *("test_team.py::test_processes", "test_run.py", "experiment=bitwidth", "the_bench_measures"),
    *("test_kills.py", "stock_command_line", "test_packaging.py", "in_their_order", "cgq=true,false"),
    *("configs.py::test_", "sweep_runs", "pretended_cuda"),
    *("test_run_commands", "test_gpu_script.py", "test_backends.py", "test_pipeline.py", "test_browser.py"),
    *("test_cache.py", "test_recipe.py", "test_full_precision.py", "test_sandbox.py", "test_plugin.py"),
    *("test_cells.py", "test_cell.py", "test_harness.py", "test_streaming.py", "test_disk.py", "mini/"),
    *("test_secrets.py", "report/", "test_experiments.py", "techniques/", "calibration/", "evaluation/"),
    *("bench/", "models/"),
)  # fmt: skip
# Files whose slow tests share what they wait for, or torchrun's port.
TOGETHER = ("test_run.py", "test_packaging.py", "test_browser.py", "test_team.py")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order, the groups of --dist loadgroup (a file's quick tests; slow ones alone), what is skipped."""
    order = {item: [part in item.nodeid for part in LONGEST] for item in items}
    items.sort(key=lambda item: order[item].index(True) if any(order[item]) else len(LONGEST))
    for item in items:
        alone = item.get_closest_marker("slow") and item.path.name not in TOGETHER
        if config.pluginmanager.hasplugin("xdist") and not alone:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Global generators start at 0 in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator seeded with 0."""
    return torch.Generator().manual_seed(0)
