"""Every kernel compiles for an H200 (sm_90) anywhere: on its tensor cores, with the registers there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import needs_triton

HERE = Path(__file__).resolve().parent
pytestmark = [needs_triton, pytest.mark.long]


def test_first_choices_use_the_tensor_cores_and_fit(tmp_path: Path) -> None:
    """The tiles that are taken where nothing was measured."""
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path]),
    }
    command = [sys.executable, str(HERE / "compile_for_hopper.py"), "tile=0", "gptq", "confidence", "norm"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=600).stdout
    lines = out.splitlines()
    assert len(lines) > 20
    spilled = [int(number) for number in re.findall(r"(\d+) bytes of stack", out)]
    assert len(spilled) == len(lines) and max(spilled) <= 64, out  # addresses, outside the loops
    for kernel, instruction in (("integer_kernel", "IGMMA"), ("weight_only_kernel", "HGMMA")):
        found = [line for line in lines if kernel in line]
        assert found and all(instruction in line and "LDGSTS" in line for line in found), out
