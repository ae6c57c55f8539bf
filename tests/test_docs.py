"""Every command of the tutorials runs, in their order, on the embedded model and small checkpoints."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_slurm
import forked
import pytest
from tiny_checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
CHECKPOINT = "/ckpts/LLaDA-8B-Base"
# Sizes that keep a run to seconds; everything else is the tutorial's.
SMALL = [
    *("eval.limit=2", "eval.batch_size=2", "eval.mc_num=2", "eval.mc_batch_size=2", "eval.fidelity_states=4"),
    *("eval.fidelity_prompts=2", "calibration.num_prompts=2", "calibration.num_states=4"),
    *("sampler.gen_length=48", "sampler.block_length=16", "sampler.steps=6", "tracker=none", "threads=1"),
]
GSM8K = [
    {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(3)
]
COPY_TASK = """task: copy_a_word
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
"""


def blocks(doc: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", doc.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(doc: Path) -> list[str]:
    return [line for block in blocks(doc, "bash") for line in block.splitlines() if line.strip()]


def prepare(folder: Path) -> None:
    """What the tutorials take for granted: a checkpoint, GSM8K's file, a task of one's own."""
    save_checkpoint(folder / "LLaDA-8B-Base", max_sequence_length=512)
    (folder / "data" / "gsm8k").mkdir(parents=True)
    data = folder / "data" / "gsm8k" / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in GSM8K), encoding="utf-8")
    shutil.copy(data, data.with_name("train.jsonl"))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "copy_a_word.yaml").write_text(COPY_TASK.replace("DATA", str(data)), encoding="utf-8")


def shell_words(command: str) -> list[str]:
    """As bash has them: shlex knows all of it but $'...', where a backslash and an n are a line break."""
    plain = re.sub(
        r"\$'((?:[^'\\]|\\.)*)'", lambda m: shlex.quote(m[1].encode().decode("unicode_escape")), command
    )
    return shlex.split(plain)


def as_run_here(command: str, folder: Path) -> list[str]:
    """The command's words, with this interpreter and small sizes where a run is not sized itself."""
    words = shell_words(command.replace(CHECKPOINT, str(folder / "LLaDA-8B-Base")))
    if words[0] == "lm_eval":
        return [sys.executable, "-m", *words]
    assert words[:2] == ["python", "-m"]
    # a size of the calibration would ask to quantize
    generating = ("sampler", "threads", *(["calibration"] if "method=" in command else []))
    sized: list[str] = {
        "dllmq.run": SMALL,
        "dllmq.generate": [s for s in SMALL if s.startswith(generating)],
        "torch.distributed.run": SMALL,
        "dllmq.report": [],
        "dllmq.status": [],
        "dllmq.bench": [],
    }[words[2]]
    return [sys.executable, *words[1:], *(s for s in sized if s.partition("=")[0] not in command)]


def marked(doc: Path) -> Any:
    """SLURM's and Ray's commands take minutes."""
    return pytest.param(
        doc, id=doc.stem, marks=pytest.mark.long if doc.stem == "scale-out" else pytest.mark.slow
    )


@pytest.mark.parametrize("doc", [marked(doc) for doc in DOCS if commands(doc)])
def test_the_commands_of_a_tutorial_run_in_their_order(doc: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    environment = os.environ | fake_slurm.install(tmp_path / "slurm") | {"PYTHONPATH": str(ROOT)}
    environment |= {"RAY_worker_niceness": "0"}  # 15 otherwise: beside other tests it hardly runs
    for source in blocks(doc, "python"):
        (tmp_path / "shrunk.py").write_text(source, encoding="utf-8")
    for command in commands(doc):
        words = as_run_here(command, tmp_path)
        if doc.stem == "scale-out" or not words[2].startswith("dllmq."):  # they start processes themselves
            done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        else:
            done = forked.run(tmp_path, *words[2:], **environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_prompts_with_line_breaks_are_read_as_bash_reads_them() -> None:
    assert shell_words(r"""say $'a b\nc' "x\ny" 'z\n'""") == ["say", "a b\nc", r"x\ny", r"z\n"]
    broken = [c for doc in DOCS for c in commands(doc) if "\\n" in c]
    assert broken and all("\n" in " ".join(shell_words(c)) for c in broken)


def test_links_lead_somewhere() -> None:
    for doc in DOCS:
        for target in re.findall(r"\]\(([^)#]+)\)", doc.read_text(encoding="utf-8")):
            assert target.startswith("http") or (doc.parent / target).exists(), f"{doc.name}: {target}"
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [doc.name for doc in DOCS if doc.name != "README.md" and f"({doc.name})" not in index] == []
