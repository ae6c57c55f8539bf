"""Secrets are in no file, page or line that a run leaves; nothing runs code that came with data."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_ThisMustNotBeSeenAnywhere000000",
    "HUGGING_FACE_HUB_TOKEN": "hf_NorThisOne00000000000000000000",
}
TINY = (
    *("eval.limit=2", "eval.fidelity_states=2", "eval.fidelity_prompts=2", "calibration.num_prompts=2"),
    *("calibration.num_states=2", "sampler.steps=3", "threads=1", "tasks=mini_gsm", "cache_dir=null"),
)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["bits=w4a8", "model.path=/no/such/folder"], ids=["finished", "failed"])
def test_secrets_of_the_environment_are_written_nowhere(tmp_path: Path, end: str) -> None:
    command = [sys.executable, "-m", "dllmq.run", "-m", "method=rtn", end, *TINY]
    env = os.environ | SECRETS | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert (run.returncode == 0) == (end == "bits=w4a8"), run.stderr.decode()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert end != "bits=w4a8" or any(file.name.endswith(".wandb") for file in files)
    written = {str(file): file.read_bytes() for file in files} | {"terminal": run.stdout + run.stderr}
    found = [(place, name) for place, content in written.items() for name, secret in SECRETS.items()
             if secret.encode() in content]  # fmt: skip
    assert found == []


# What reads code or objects from a file, or hands text to a shell; the sandbox's runner is there to do it.
CALLS = {"eval", "exec", "compile", "system", "popen", "load_module", "exec_module"}
SANDBOXED = {
    "evaluation/sandbox_runner.py",
    "evaluation/benchmarks.py",  # lm-eval's own task files
    "mini/code_problems.py",  # reference solutions that this package wrote itself
}


@pytest.mark.parametrize("file", sorted((ROOT / "dllmq").rglob("*.py")), ids=lambda f: f.stem)
def test_nothing_runs_what_a_file_holds(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{file.name}:{node.lineno}"
        if (owner, name) == ("torch", "load"):  # tensors alone, by torch's own restricted reader
            assert keywords["weights_only"] == "True", where
        assert keywords.get("trust_remote_code", "False") == "False", where
        assert keywords.get("allow_pickle", "False") == "False" and "shell" not in keywords, where
        if owner in ("", "os") and name in CALLS:
            assert file.relative_to(ROOT / "dllmq").as_posix() in SANDBOXED, where
        if (owner, name) == ("yaml", "load"):
            assert ast.unparse(node.args[1]) in ("Loader", "_Loader", "_Base"), where  # SafeLoader's children
