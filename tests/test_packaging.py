"""The wheel holds what the checkout holds and runs from another folder; what the code imports is declared."""

import ast
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import dllmq

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Folder of a listed package, through the package-dir mapping."""
    return ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))


def shipped_data() -> dict[str, Path]:
    """Data files that package-data's patterns match: path in the wheel -> file in the checkout."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(folder_of(package)).as_posix()}": file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in files_matching(folder_of(package), pattern)
    }


def files_matching(folder: Path, pattern: str) -> Iterator[Path]:
    # pathlib's trailing ** names folders only until Python 3.13; setuptools means files
    deep = pattern + "/*" if pattern.endswith("**") else pattern
    return (file for file in folder.glob(deep) if file.is_file())


def needed_data() -> set[Path]:
    """What the program reads at run time: every YAML of conf/ and dllmq/, and the embedded model."""
    weights = (f for f in (ROOT / "dllmq" / "mini" / "weights").rglob("*") if f.is_file())
    return {*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "dllmq").rglob("*.yaml"), *weights}


def test_every_data_file_is_shipped() -> None:
    assert sorted(needed_data() - set(shipped_data().values())) == []


def test_every_package_is_listed() -> None:
    folders = {init.parent for init in (ROOT / "dllmq").rglob("__init__.py")} | {ROOT / "conf"}
    assert folders == {folder_of(package) for package in SETUPTOOLS["packages"]}


def test_configuration_is_importable_without_an_install() -> None:
    program = "import dllmq.conf; print(dllmq.conf.__file__)"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(out.strip()) == ROOT / "conf" / "__init__.py"


def test_installed_version_is_the_projects() -> None:
    if dllmq.__version__ == "0+checkout":
        pytest.skip("dllmq is not installed here")
    assert dllmq.__version__ == PROJECT["project"]["version"]


def test_changelog_names_the_version() -> None:
    assert f"## [{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_library_that_is_imported_is_declared() -> None:
    optional = {"compressed-tensors", "triton", "wandb-workspaces"}
    declared = {normalized(requirement) for requirement in PROJECT["project"]["dependencies"]} | optional
    providers = packages_distributions()
    for path in (ROOT / "dllmq").rglob("*.py"):
        for library in third_party(ast.parse(path.read_text(encoding="utf-8"))):
            names = {normalized(d) for d in providers.get(library, [library])}
            assert names & declared, f"{path.relative_to(ROOT)}: {library} is not declared in pyproject.toml"


def normalized(requirement: str) -> str:
    """Distribution name of a requirement, as indexes spell it: 'lm_eval>=0.4.9' -> 'lm-eval'."""
    name = requirement.replace("_", "-").lower()
    return name[: next((i for i, c in enumerate(name) if not (c.isalnum() or c in "-.")), len(name))]


def third_party(tree: ast.AST) -> set[str]:
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            else []
        )
    }
    return names - set(sys.stdlib_module_names) - {"dllmq"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes from the sdist it makes first."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a new environment with the wheel in it, and this environment's libraries behind it.

    A .pth file of the new environment names this environment's site-packages. Python does not read the .pth
    files of a folder added that way, so an editable dllmq that is installed there does not come along.
    """
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.run([python, "-c", site], capture_output=True, text=True, check=True).stdout.strip()
    (Path(target) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.mark.slow
@pytest.mark.network
def test_wheel_holds_every_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sorted(set(shipped_data()) - names) == []
    hook = {"dllmq_lm_eval.py", "dllmq_lm_eval.pth"}
    assert {name for name in names if not name.startswith(("dllmq/", "dllmq-"))} == hook


@pytest.mark.slow
@pytest.mark.network
def test_lm_eval_finds_the_installed_package(clean_python: Path, tmp_path: Path) -> None:
    """`lm_eval run --model dllmq` after an install alone; and Python starts without importing either."""
    program = (
        "import sys; print({'dllmq', 'lm_eval'} & set(sys.modules)); "
        "from lm_eval.api.registry import get_model; "
        "print(get_model('dllmq').__name__, get_model('dummy').__name__)"
    )
    command = [clean_python, "-c", program]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["set()", "DllmqLM DummyLM"]


@pytest.mark.slow
@pytest.mark.network
def test_wheel_runs_from_another_folder(clean_python: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str) -> str:
        command = [str(clean_python), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        ).stdout

    where = Path(run("-c", "import dllmq; print(dllmq.__file__)").strip())
    assert where.is_relative_to(clean_python.parent.parent)
    assert "method:" in run("-m", "dllmq.run", "--cfg", "job")
