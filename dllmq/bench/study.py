"""What is made of a results.json: table.md, figures, report.html; and README.md of experiments/speed.

    python -m dllmq.bench --report experiments/speed

README.md has question, commands, targets and verdict. `gpu/results.json` in the folder, where there is one,
is what experiments/speed/gpu.py measured; `notes.md` is taken in as it is: it is where a person says why a
target was missed. Targets that another study measured are read from that study's page beside the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dllmq.bench.figure import name_of, write_figures
from dllmq.bench.page import render
from dllmq.bench.rows import RESULTS, Row, Section, read_sections
from dllmq.bench.table import amount, markdown, title
from dllmq.report.results import write_text_atomic

TABLE, PAGE, README, NOTES, GPU = "table.md", "report.html", "README.md", "notes.md", "gpu"


@dataclass(frozen=True)
class Target:
    """A claim of the project and the rows that decide it.

    Attributes:
        text: what is aimed at.
        key: of the rows; device: where; shape, within: a part of the section's shape and of the row's size.
        least: ratio to reach; most: seconds not to exceed, where it is a duration.
        number: which of a row's further numbers is the ratio meant; "": the row's ratio.
    """

    text: str
    key: str
    device: str
    least: float = 0.0
    most: float | None = None
    shape: str = ""
    within: str = ""
    number: str = ""

    def rows(self, sections: Sequence[Section]) -> list[Row]:
        return [
            row
            for s in sections
            if s.machine["device"] == self.device and self.shape in s.shape and not s.quick
            for row in s.rows
            if row.key == self.key and self.within in row.shape
        ]

    def needs_amx(self, sections: Sequence[Section]) -> bool:
        """Whether it is said of a processor with AMX, and measured on one without."""
        found = {flag for s in sections if s.machine["device"] == "cpu" for flag in s.machine["instructions"]}
        return "AMX" in self.text and not any(flag.startswith("amx") for flag in found)

    def reached(self, row: Row) -> bool:
        if self.most is not None:
            return row.ours_value <= self.most
        found = row.numbers.get(self.number) if self.number else row.ratio
        return found is not None and found >= self.least

    def words(self, row: Row) -> str:
        """What the row says of it."""
        if self.number:
            return f"{row.numbers[self.number]:.2f} x" if self.number in row.numbers else "not recorded"
        if row.ratio is None:
            return amount(row.ours_value, row.unit)
        span = f" ({row.low:.2f} - {row.high:.2f})" if row.repeats > 1 else ""
        return f"{row.ratio:.2f} x{span}"


@dataclass(frozen=True)
class StudyTarget:
    """A target whose measurement is another study's.

    Attributes:
        text: what is aimed at.
        study: its folder's name under experiments; most: seconds not to exceed.
    """

    text: str
    study: str
    most: float


NOT_MEASURED = "not measured"
_NO_AMX = "; this processor has no AMX"
ONE_B, EIGHT_B = "llada_1b_shape", "llada_8b_shape"
TARGETS = (
    Target(
        "exact generation 2 x the plain loop, CPU with AMX, 1B shape, batch 8",
        "generate.exact", "cpu", 2.0, shape=ONE_B, within="batch 8",
    ),
    Target(
        "exact generation 3 x the plain loop, H200, 8B shape, batch 1",
        "generate.exact", "cuda", 3.0, shape=EIGHT_B, within="batch 1,",
    ),
    Target(
        "dual cache with threshold 0.9: 5 x more (embedded model)",
        "generate.dual_threshold", "cpu", 5.0, shape="mini",
    ),
    Target("GPTQ's columns 5 x the authors' loop, 4096 x 4096 float32, CPU", "quantize.loop", "cpu", 5.0),
    Target("GPTQ with its factorization 2.5 x, CPU", "quantize.gptq", "cpu", 2.5),
    Target("GPTQ with its factorization 10 x, GPU", "quantize.gptq", "cuda", 10.0),
    Target(
        "LLaDA-8B, everything on, under 3 minutes on an H200",
        "quantize.gptq_blocks", "cuda", most=180.0, within="32 blocks",
    ),
    Target(
        "W8A8 1.5 x bf16, CPU, 256 tokens, 4096 -> 12288",
        "linear.w8a8", "cpu", 1.5, within="256 x 4096",
    ),
    Target(
        "W8A8 1.5 x bf16, CPU, 1024 tokens, 4096 -> 12288",
        "linear.w8a8", "cpu", 1.5, within="1024 x 4096",
    ),
    Target(
        "W4A8 1.8 x bf16 end to end, H200, batch 16",
        "generate.w4a8", "cuda", 1.8, shape=EIGHT_B, within="batch 16",
    ),
    Target(
        "W4A4 1.8 x bf16 end to end, H200, batch 16",
        "generate.w4a4", "cuda", 1.8, shape=EIGHT_B, within="batch 16",
    ),
    *(
        Target(
            f"{bits.upper()} in 1/3.4 of the memory of bf16's weights, {what}",
            f"memory.weights_{bits}", "cuda", 3.4, shape=EIGHT_B, number=number,
        )
        for bits in ("w4a8", "w4a4")
        for what, number in (
            ("the blocks alone", "without_embedding_and_head"),
            ("embedding and head, which stay in bf16, included (2.9 x by arithmetic)", ""),
        )
    ),
)  # fmt: skip
STUDIES = (
    StudyTarget("the default demo under 5 minutes on 2 cores", "demo", 300.0),
    StudyTarget("the 16-cell ablation, n = 1000, one seed, under 60 minutes", "ablation_one_seed", 3600.0),
)

QUESTION = """# Speed and memory

**Question.** How much faster are generation, quantization and quantized linears than what people run today,
at equal output, and how much memory do packed weights save? Every number is a ratio of two things measured
in the same run, interleaved: the plain loop of LLaDA's published code, GPTQ's Algorithm 1 as published,
`F.linear` in bf16.

**Command** (writes [results.json](results.json), [table.md](table.md), report.html, figures; then this page):
"""


QUICK = (
    "`python -m dllmq.bench --quick` runs every section at toy sizes, in under a minute: a trial of the\n"
    "program, not a measurement."
)


def write_study(folder: Path) -> str:
    """Writes table.md, the figures and README.md of a folder; returns the page.

    Raises:
        ValueError: no results in it.
    """
    sections, on_gpu = read_sections(folder / RESULTS), read_sections(folder / GPU / RESULTS)
    if not sections:
        raise ValueError(f"{folder} has no {RESULTS}: measure first, python -m dllmq.bench --out {folder}.")
    write_tables(folder)
    if on_gpu:
        write_tables(folder / GPU)
    notes = folder / NOTES
    words = notes.read_text(encoding="utf-8") if notes.is_file() else ""
    page = readme(sections, on_gpu, words, studies(folder.absolute().parent))
    write_text_atomic(folder / README, page)
    return page


def write_tables(folder: Path) -> list[str]:
    """table.md, report.html and figures of a folder's results.json; no figures without matplotlib.

    Returns:
        What lies in the folder now; nothing where there are no results.
    """
    sections = read_sections(folder / RESULTS)
    if not sections:
        return []
    write_text_atomic(folder / TABLE, markdown(sections))
    write_text_atomic(folder / PAGE, render(sections))
    drawn = find_spec("matplotlib") is not None and write_figures(sections, folder / "figures")
    return [PAGE, TABLE, RESULTS, *(["figures"] if drawn else [])]


def studies(experiments: Path) -> dict[str, float]:
    """study -> the seconds that its page says it took, of those that are there."""
    pages = {target.study: experiments / target.study / README for target in STUDIES}
    read = {name: file.read_text(encoding="utf-8") for name, file in pages.items() if file.is_file()}
    return {name: took for name, text in read.items() if (took := cost(text)) is not None}


def cost(page: str) -> float | None:
    """Seconds after **Cost.** on a study's page: "3 min 33 s"; None where it tells none."""
    found = re.search(r"\*\*Cost\.\*\* (?:(\d+) h )?(\d+) min (\d+) s\b", page)
    if found is None:
        return None
    hours, minutes, seconds = (int(text or 0) for text in found.groups())
    return 3600.0 * hours + 60 * minutes + seconds


def readme(
    sections: Sequence[Section],
    on_gpu: Sequence[Section],
    notes: str = "",
    took: Mapping[str, float] | None = None,
) -> str:
    """The page; `took` as from `studies`."""
    measured = [section for section in sections if not section.quick] or sections
    commands = list(dict.fromkeys(section.command for section in measured))
    lines = ["```", *commands, "python -m dllmq.bench --report experiments/speed", "```", "", QUICK]
    parts = [
        QUESTION.rstrip("\n"),
        "\n".join(lines),
        _gpu_words(on_gpu),
        verdict([*sections, *on_gpu], took or {}),
    ]
    parts += [notes.strip()] if notes.strip() else []
    parts += [f"![{s.section}, {s.shape}](figures/{name_of(s)}.png)" for s in sections if _is_drawn(s)]
    parts += ["## What is compared", COMPARED.strip()]
    return "\n\n".join(parts) + "\n"


def _is_drawn(section: Section) -> bool:
    return not section.quick and any(row.ratio is not None for row in section.rows)


def _gpu_words(on_gpu: Sequence[Section]) -> str:
    script = "`python experiments/speed/gpu.py --out experiments/speed/gpu`"
    if on_gpu:
        names = sorted({str(section.machine["accelerator"]) for section in on_gpu})
        return f"On a GPU ({', '.join(names)}) the one command is {script}: [gpu/table.md](gpu/table.md)."
    return (
        "**No GPU was available.** Nothing here was measured on one, and no GPU number is printed; the one\n"
        f"command for a machine that has one is\n{script}, under 10 minutes."
    )


def verdict(sections: Sequence[Section], took: Mapping[str, float] | None = None) -> str:
    """**Verdict.** and a table of the targets: what was reached, or that it was not measured."""
    found = [*_decided(sections), *_decided_elsewhere(took or {})]
    met, missed = (sum(good is wanted for _, _, good in found) for wanted in (True, False))
    outcome = {True: "met", False: "missed", None: "-"}
    lines = ["| target | reached | |", "|---|---|---|"]
    lines += [f"| {text} | {reached} | {outcome[good]} |" for text, reached, good in found]
    if all(section.quick for section in sections):
        words = (
            "**Verdict.** None yet: what lies here is a trial at toy sizes, which shows that everything runs."
        )
    else:
        left = len(found) - met - missed
        measured = f"{met} of {met + missed} targets that were measured are met"
        words = f"**Verdict.** {measured}; {left} were not measured."
    unequal = [row.what for section in sections for row in section.unequal]
    claims = (
        f"Outputs that must be equal are NOT in: {', '.join(unequal)}."
        if unequal
        else "Every output that must be equal is equal."
    )
    stopped = [f"{title(section)}." for section in sections if not section.finished]
    cut_off = f"\n\n**Cut off**, rows are missing: {' '.join(stopped)}" if stopped else ""
    return f"{words} {claims}{cut_off}\n\n" + "\n".join(lines)


def _decided(sections: Sequence[Section]) -> list[tuple[str, str, bool | None]]:
    """(target, what was reached, whether that is enough or None) of what the bench measures."""
    found: list[tuple[str, str, bool | None]] = []
    for target in TARGETS:
        if rows := target.rows(sections):
            reached = ", ".join(map(target.words, rows)) + (_NO_AMX if target.needs_amx(sections) else "")
            found.append((target.text, reached, all(map(target.reached, rows))))
        else:
            found.append((target.text, NOT_MEASURED, None))
    return found


def _decided_elsewhere(took: Mapping[str, float]) -> list[tuple[str, str, bool | None]]:
    """The same of what other studies measured."""
    found: list[tuple[str, str, bool | None]] = []
    for target in STUDIES:
        if (seconds := took.get(target.study)) is None:
            found.append((target.text, NOT_MEASURED, None))
        else:
            link = f"[{target.study}](../{target.study}/README.md)"
            words = f"{int(seconds // 60)} min {seconds % 60:.0f} s ({link})"
            found.append((target.text, words, seconds <= target.most))
    return found


COMPARED = """
- *plain loop*: the published loop on the same model and kernels. Every step runs the transformer and the head
  over the whole canvas, with a softmax over the whole vocabulary at every position; no row leaves the batch.
- *exact*: `dllmq.diffusion.generate` on the same batch; tokens must be equal in float32. In bfloat16 many
  confidences are equal, and rounding orders them: the share of equal tokens is shown.
- *prefix cache, dual cache, threshold*: opt-in and approximate; against ours, exact. Thresholds are measured
  on the embedded model only, since random weights are never confident.
- *textbook*: Algorithm 1 of GPTQ by columns in blocks of 128, and the authors' Cholesky, inverse, Cholesky.
- *packed*: `QuantLinear` on its integer kernels; *fake* dequantizes and multiplies in bf16.
- *llada_1b_shape, llada_8b_shape*: random weights of LLaDA's sizes (`dllmq/bench/shapes.py`).
- *weights*: all tensors a model holds, embedding and head in bf16 included.
"""
