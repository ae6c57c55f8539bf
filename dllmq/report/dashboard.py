"""`python -m dllmq.report.dashboard --entity E --project P [--save]`: the project's workspace in W&B.

Without --save the workspace is built, checked and listed; nothing leaves the machine. --save stores it as a
new saved view of the project, which needs an API key. Panels draw what `tracker` logs, and nothing else.

The table of runs is grouped by GROUPS, so that a bar or line is a mean over calibration seeds with its
standard error over seeds. The intervals paired by problem are in the sweep's report.html.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from types import SimpleNamespace
from typing import Any

from dllmq.report.tracker import SAMPLES, curve_key, has_key, score_key, without_secrets

GROUPS = ("method", "bits", "tmas", "cgq", "iaaq")  # of `axes` in a run's configuration
SCORES = {"mini_gsm": "exact_match,strict-match", "mini_choice": "acc", "mini_code": "pass@1"}
FIDELITY = (
    "kl", "top1", "argmax_at_k", "slots_at_k", "hidden_error",
    "final_agreement", "exact_match_rate", "first_divergence_step", "first_divergence_mask_ratio",
)  # fmt: skip
COST = (
    "calibrate_s", "quantize_s", "evaluate_s", "peak_memory_bytes", "weight_bytes", "quantized_share",
    "forwards", "fp_forwards", "tokens_per_second", "truncated_share",
)  # fmt: skip
BY_STEP = ("kl", "top1", "argmax_at_k", "slots_at_k", "hidden_error", "divergence")
BY_MASK_RATIO = ("kl", "top1", "argmax_at_k", "slots_at_k")
BY_BLOCK = ("hidden_error",)
X_TITLES = {
    "denoise/step": "denoising step",
    "mask_ratio/block": "block of the mask ratio (0 = most masked)",
    "transformer/block": "transformer block (0 = first)",
}


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, a `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Raises:
        ModuleNotFoundError: wandb-workspaces is not installed.
    """
    lib = _library()
    sections = {
        "scores": _scores(lib),
        "by denoising step": [_line(lib, f"{name}_by_step") for name in BY_STEP] + [_divergence(lib)],
        "by mask ratio": [_line(lib, f"{name}_by_mask_ratio") for name in BY_MASK_RATIO],
        "by transformer block": [_line(lib, f"{name}_by_block") for name in BY_BLOCK],
        "fidelity": [_bars(lib, name, f"fidelity/{name}") for name in FIDELITY],
        "cost": [_bars(lib, name, f"cost/{name}") for name in COST],
        "changed samples": [lib.panels.WeavePanelSummaryTable(table_name=SAMPLES)],
    }
    workspace = lib.workspaces.Workspace(
        entity=entity,
        project=project,
        name="dllmq: methods and techniques",
        sections=[
            lib.workspaces.Section(
                name=name,
                panels=panels,
                is_open=True,
                layout_settings=lib.workspaces.SectionLayoutSettings(columns=3, rows=-(-len(panels) // 3)),
            )
            for name, panels in sections.items()
        ],
        runset_settings=lib.workspaces.RunsetSettings(
            groupby=[lib.expr.Config(f"axes.{name}") for name in GROUPS],
            pinned_columns=[f"summary:{key}" for key in (*_score_keys(), "fidelity/kl")],
        ),
    )
    specification(workspace)  # raises where W&B's schema does not hold
    return workspace


def specification(workspace: Any) -> dict[str, Any]:
    """The JSON that W&B stores for a workspace; made on this machine, and checked against W&B's schema."""
    spec: dict[str, Any] = workspace._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]
    return spec


def _library() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, about how the package is written
        import wandb_workspaces.expr as expr
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    return SimpleNamespace(expr=expr, panels=panels, workspaces=workspaces)


def _score_keys() -> list[str]:
    return [score_key(task, metric) for task, metric in SCORES.items()]


def _scores(lib: SimpleNamespace) -> list[Any]:
    """For each task a bar per group of runs, and a bar per value of each switch; all of it as one sweep."""
    p, panels = lib.panels, []
    for task, key in zip(SCORES, _score_keys(), strict=True):
        panels.append(_bars(lib, task, key))
        panels += [_bars(lib, f"{task} by {axis}", key, f"axes.{axis}") for axis in GROUPS]
    columns = [p.ParallelCoordinatesPlotColumn(metric=p.Config(f"axes.{name}")) for name in GROUPS]
    columns += [
        p.ParallelCoordinatesPlotColumn(metric=p.SummaryMetric(key))
        for key in ("fidelity/kl", *_score_keys())
    ]
    return [*panels, p.ParallelCoordinatesPlot(title="switches, KL and scores", columns=columns)]


def _bars(lib: SimpleNamespace, title: str, key: str, axis: str | None = None) -> Any:
    """A bar per value of `axis`, None: per group of the table of runs."""
    groupby = None if axis is None else lib.panels.Config(axis)
    return lib.panels.BarPlot(
        title=title, metrics=[key], groupby=groupby, groupby_aggfunc="mean", groupby_rangefunc="stderr"
    )


def _line(lib: SimpleNamespace, curve: str) -> Any:
    key, x = curve_key(curve)
    return lib.panels.LinePlot(
        title=curve, x=x, y=[key], title_x=X_TITLES[x], groupby_aggfunc="mean", groupby_rangefunc="stderr"
    )


def _divergence(lib: SimpleNamespace) -> Any:
    """Divergence over the mask ratio of full precision's trajectory, which shrinks from step to step."""
    key, x = curve_key("divergence_by_step")[0], curve_key("divergence_mask_ratio_by_step")[0]
    title = "divergence over the mask ratio"
    return lib.panels.LinePlot(title=title, x=x, y=[key], title_x="mask ratio (1 = all masked)")


# ---------------------------------------------------------------- command line


def describe(workspace: Any) -> str:
    """The sections and panels, a line each."""
    lines = [f"{workspace.name} ({workspace.entity}/{workspace.project})"]
    for section in workspace.sections:
        lines.append(f"{section.name}: {len(section.panels)} panels")
        lines += [f"  {_describe_panel(panel)}" for panel in section.panels]
    return "\n".join(lines)


def _describe_panel(panel: Any) -> str:
    kind = type(panel).__name__
    if kind == "LinePlot":
        return f"{panel.title}: {', '.join(panel.y)} over {panel.x}"
    if kind == "BarPlot":
        by = f" by config {panel.groupby.name}" if panel.groupby else ""
        return f"{panel.title}: {', '.join(panel.metrics)}{by}"
    if kind == "ParallelCoordinatesPlot":
        return f"{panel.title}: {', '.join(column.metric.name for column in panel.columns)}"
    return f"table {panel.table_name}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dllmq.report.dashboard", description=__doc__)
    parser.add_argument("--entity", required=True, help="user or team in W&B")
    parser.add_argument("--project", default="dllmq", help="tracker.project of the runs (%(default)s)")
    parser.add_argument("--save", action="store_true", help="store it in W&B as a new saved view")
    args = parser.parse_args(argv)
    try:
        workspace = build_workspace(args.entity, args.project)
    except ModuleNotFoundError as error:
        return _fail(f"{error}; install it with: pip install 'dllmq[dashboard]'")
    print(describe(workspace))
    if not args.save:
        print("Built and checked here, nothing was sent; --save stores it in W&B (needs an API key).")
        return 0
    if not has_key():
        return _fail("no API key found: run `wandb login` or set WANDB_API_KEY, then give --save again.")
    try:
        workspace.save()  # prints the address
    except Exception as error:  # no network, no such entity, no right to write there
        text = " ".join(str(error).split()) or "no message"
        return _fail(f"W&B did not take it ({type(error).__name__}: {without_secrets(text)[:300]}).")
    return 0


def _fail(text: str) -> int:
    print(f"dllmq.report.dashboard: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
