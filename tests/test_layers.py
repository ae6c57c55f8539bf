"""A package imports only from the layers before it, and a library only appears behind its fence.

Read from the source with `ast`; imports inside functions, under TYPE_CHECKING or by `import_module` count.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    "interrupt",
    "workers",
    "faults",
    "refusals",
    "durable",
    "locks",
    "cache",
    "numerics",
    "kernels",
    "diffusion",
    "models",
    "calibration",
    "methods",
    "techniques",
    "recipe",
    "pipeline",
    "checkpoint",
    "mini",
    "evaluation",
    "report",
    "config",
    "estimate",
    "full_precision",
    "resume",
    "kept",
    "machine",
    "team",
    "cell",
]
ENTRY_POINTS = {"run", "bench", "generate", "status"}  # the last layer; they do not import each other
RANK = {name: rank for rank, name in enumerate(LAYERS)} | dict.fromkeys(ENTRY_POINTS, len(LAYERS))

# library -> modules (with all below them) that may import it
FENCES = {
    "hydra": {"config", "run", "report.callback"},
    "omegaconf": {"config", "run", "report.callback"},
    "wandb": {"report.tracker", "report.dashboard"},
    "wandb_workspaces": {"report.dashboard"},
    "lm_eval": {"evaluation"},
    "transformers": {"models", "mini", "checkpoint"},
    "rich": {"report", "mini.train"} | ENTRY_POINTS,
    "triton": {"kernels"},  # and only inside functions: everything imports without it
}
BANNED = {"pickle", "cPickle", "cloudpickle", "dill", "shelve"}  # loading runs code


@dataclass(frozen=True)
class Import:
    name: str  # absolute dotted name; for `from a import b` a.b
    line: int
    lazy: bool  # inside a function


def module_name(path: Path) -> str:
    """Name within dllmq: 'models.llada' for models/llada.py, 'models' for its __init__, '' for dllmq."""
    parts = list(path.relative_to(ROOT / "dllmq").with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """Every import below `tree`; `package` (absolute) is where relative imports start."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{source}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := imported_by_call(node)):
            yield Import(name, node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, package, inside)


def imported_by_call(call: ast.Call) -> str | None:
    """'x' for `import_module("x")` and `__import__("x")`, else None."""
    function = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if function not in {"import_module", "__import__"} or not call.args:
        return None
    argument = call.args[0]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else None


def within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, as the module dllmq.<module>, may not do; one sentence each."""
    tree = ast.parse(source)
    layer = module.split(".")[0]
    found = []
    if layer and layer not in RANK:
        found.append(f"dllmq.{module}: '{layer}' has no layer; give it its place in LAYERS or ENTRY_POINTS")
    package = ".".join(
        filter(None, ["dllmq", *(module if is_package else module.rpartition(".")[0]).split(".")])
    )
    for item in imports(tree, package):
        top, _, rest = item.name.partition(".")
        where = f"dllmq.{module}, line {item.line}"
        if item.name.endswith(".*"):
            found.append(f"{where}: import * from {item.name[:-2]}; name what is used")
        if top == "dllmq":
            target = rest.split(".")[0]
            if target in RANK and target != layer and RANK[target] >= RANK.get(layer, -1):
                found.append(
                    f"{where}: imports dllmq.{target}, which is not in a layer before {layer or 'dllmq'}"
                )
        if top in BANNED:
            found.append(f"{where}: imports {top}; loading such a file runs code, use safetensors or JSON")
        if top in FENCES and not within(module, FENCES[top]):
            found.append(f"{where}: imports {top}, allowed only in {', '.join(sorted(FENCES[top]))}")
        if top == "triton" and not item.lazy:
            found.append(
                f"{where}: imports triton at import time; import it inside the function that needs it"
            )
    return found + [f"dllmq.{module}, line {line}: {what}" for line, what in unsafe_loading(tree)]


def unsafe_loading(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and reason of whatever lets a checkpoint run code of its own."""
    for node in ast.walk(tree):
        name = getattr(node, "arg", None) or getattr(node, "id", None) or getattr(node, "attr", None)
        value = getattr(node, "value", None)
        refused = isinstance(node, ast.keyword) and getattr(value, "value", None) is False
        if "trust_remote_code" in (name, value if isinstance(node, ast.Constant) else None) and not refused:
            yield node.lineno, "trust_remote_code; models are native and run no code from a checkpoint"
        if (
            isinstance(node, ast.keyword)
            and name == "weights_only"
            and getattr(value, "value", None) is not True
        ):
            yield node.lineno, "weights_only is not True; loading such a file may run code"


SOURCES = sorted((ROOT / "dllmq").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path) or "dllmq")
def test_module_keeps_to_its_layer_and_fences(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_name(path), is_package=path.name == "__init__.py") == []


def test_no_configuration_trusts_remote_code() -> None:
    files = [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "dllmq").rglob("*.yaml")]
    guilty = [str(f.relative_to(ROOT)) for f in files if "trust_remote_code" in f.read_text(encoding="utf-8")]
    assert guilty == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("numerics.grid", "import dllmq.models"),
        ("numerics.grid", "from dllmq import models"),
        ("numerics.grid", "from ..models import llada"),
        ("numerics.grid", "from .. import models"),
        ("diffusion.sampler", "def f():\n    from dllmq.models.base import Block"),
        ("diffusion.sampler", "if TYPE_CHECKING:\n    from dllmq.models.base import Block"),
        ("methods.gptq", "import importlib\nimportlib.import_module('dllmq.pipeline')"),
        ("bench", "from dllmq.run import main"),
        ("", "from dllmq.models import load_model"),
        ("helpers", "x = 1"),
        ("methods.gptq", "from dllmq.numerics import *"),
        ("report.table", "import wandb"),
        ("pipeline", "from omegaconf import OmegaConf"),
        ("models.llada", "import hydra.utils"),
        ("report.html", "import lm_eval.api"),
        ("evaluation.harness", "from transformers import AutoTokenizer"),
        ("pipeline", "def f():\n    from rich.progress import Progress"),
        ("numerics.packing", "def f():\n    import triton"),
        ("kernels.int8", "import triton.language as tl"),
        ("kernels.int8", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("checkpoint", "import pickle"),
        ("checkpoint", "from pickle import loads"),
        ("checkpoint", "torch.load(path, weights_only=False)"),
        ("models.llada", "AutoModel.from_pretrained(p, trust_remote_code=True)"),
        ("models.llada", "AutoModel.from_pretrained(p, trust_remote_code=asked)"),
        ("models.llada", "kwargs = {'trust_remote_code': True}"),
    ],
)
def test_checker_finds_what_is_forbidden(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("methods.gptq", "from dllmq.numerics.grid import Grid\nfrom .rtn import rtn", False),
        ("methods", "from .gptq import gptq\nfrom ..numerics import Grid", True),
        ("run", "import hydra\nfrom dllmq.config import RunConfig\nfrom rich.table import Table", False),
        ("report.callback", "from hydra.experimental.callback import Callback", False),
        ("kernels.int8", "def kernel():\n    import triton.language as tl", False),
        ("evaluation.harness", "from dllmq import __version__\nimport lm_eval", False),
        ("checkpoint", "'''No trust_remote_code.'''\ntorch.load(path, weights_only=True)", False),
        ("models.tokenizer", "AutoTokenizer.from_pretrained(p, trust_remote_code=False)", False),
        ("numerics.grid", "from rich_text import x\nimport torch, math", False),
    ],
)
def test_checker_passes_what_is_allowed(module: str, source: str, is_package: bool) -> None:
    assert violations(source, module, is_package) == []


def test_every_layer_that_exists_is_checked() -> None:
    seen = {module_name(path).split(".")[0] for path in SOURCES} - {""}
    folders = {p.name for p in (ROOT / "dllmq").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders <= seen <= set(RANK)
