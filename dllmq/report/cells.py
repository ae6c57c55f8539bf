"""The cells of the tables: how a score, a difference, a p-value and a plain number are written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dllmq.evaluation.statistics import Estimate
from dllmq.report.compare import ALPHA, Delta
from dllmq.report.groups import Mean, is_share, lower_is_better, most_seeds
from dllmq.report.results import Sweep
from dllmq.report.table import EMPTY, Cell, Tone


def score_cell(score: Mean | None, share: bool) -> Cell:
    """`value ± stderr (n)` or `(n x seeds)`, shares in percent."""
    if score is None:
        return EMPTY
    value, error, seeds = _number(score.value, share), score.stderr, len(score.per_seed)
    pm = None if error is None else _number(error, share)
    counts = [] if score.n is None else [f"{score.n:,.0f}".replace(",", " ")]
    counts += [f"{seeds} seeds"] if seeds > 1 else []
    return Cell(
        value if pm is None else f"{value} ± {pm}",
        compact=value if pm is None else f"{value}±{pm}",
        sort=score.value,
        note=f"({' x '.join(counts)})" if counts else "",
    )


def delta_cell(d: Delta | None, metric: str) -> Cell:
    """`+value [low, high]`, or `+value ± stderr u` where not paired; shares in points, KL in nats."""
    if d is None:
        return EMPTY
    value, mark = _signed_in(metric, d.value, 3), "" if d.paired else " u"
    if d.low is not None and d.high is not None:
        low, high = (_signed_in(metric, x, 2).lstrip("+") for x in (d.low, d.high))
        text, compact = f"{value} [{low}, {high}]", f"{value} [{low},{high}]"
    elif d.stderr is not None:
        error = kl_text(d.stderr, 2) if metric == "kl" else _number(d.stderr, is_share(metric))
        text, compact = f"{value} ± {error}{mark}", f"{value}±{error}{mark.strip()}"
    else:
        text = compact = value + mark
    return Cell(text, _tone(d, metric), compact=compact, sort=d.value)


def runs_cell(runs: Estimate, metric: str) -> Cell:
    """`mean ± stderr (runs)`, in points or nats."""
    value = _signed_in(metric, runs.value, 3)
    if not math.isfinite(runs.stderr):
        return Cell(f"{value} ({runs.n})", sort=runs.value)
    error = kl_text(runs.stderr, 2) if metric == "kl" else _number(runs.stderr, is_share(metric))
    return Cell(f"{value} ± {error} ({runs.n})", compact=f"{value}±{error}", sort=runs.value)


def _tone(d: Delta, metric: str) -> Tone:
    if not d.clear:
        return "muted"
    return "better" if (d.value > 0) != lower_is_better(metric) else "worse"


def p_cell(d: Delta | None) -> Cell:
    """`p`, or `p (Holm's p)` once corrected; the compact text is the one that decides."""
    if d is None or d.p is None:
        return EMPTY
    if d.p_holm is None:
        return Cell(p_text(d.p), sort=d.p)
    return Cell(f"{p_text(d.p)} ({p_text(d.p_holm)})", compact=p_text(d.p_holm), sort=d.p_holm)


def p_text(p: float) -> str:
    """Three digits: <.001, .039, 1."""
    if p < 0.001:
        return "<.001"
    return "1" if p >= 0.9995 else f"{p:.3f}".lstrip("0")


def number_cell(value: float | int | None, form: str, scale: float | int = 1) -> Cell:
    """A plain number, scaled; "–" when it was not measured."""
    return EMPTY if value is None else Cell(form.format(value * scale).replace(",", " "), sort=value)


def kl_cell(kl: Mean | None) -> Cell:
    """`value ± stderr` in nats."""
    if kl is None:
        return EMPTY
    value = kl_text(kl.value)
    error = "" if kl.stderr is None else f" ± {kl_text(kl.stderr, 1)}"
    return Cell(value + error, compact=value, sort=kl.value)


def kl_text(value: float | int, digits: int = 3) -> str:
    """A KL in nats with `digits` significant digits: 0.0952, 1.23, 2.1e-05."""
    return f"{value:#.{digits}g}".rstrip(".")


def signed(value: float | int, digits: int) -> str:
    """+1.0, −1.0, and 0.0 without a sign."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def _signed_in(metric: str, value: float | int, digits: int) -> str:
    """A difference in the unit it is shown in; `digits` are the significant ones of a KL."""
    if metric == "kl":
        return ("−" if value < 0 else "+" if value > 0 else "") + kl_text(abs(value), digits)
    return signed(100 * value, 1) if is_share(metric) else signed(value, 3)


def _number(value: float | int, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.3f}"


# ---------------------------------------------------------------- footnotes that tables share


def doubtful(deltas: Sequence[Delta | None]) -> Iterator[str]:
    """A warning where an interval leaves out 0 and p is not below .05: only few problems differ at all."""
    apart = [d for d in deltas if d and d.low is not None and d.high is not None and d.low * d.high > 0]
    if any(d.p is not None and d.p >= ALPHA for d in apart):
        yield (
            "Where an interval leaves out 0 but the uncorrected p is .05 or more, few problems differ and "
            "the interval is too narrow: p decides."
        )


def tests_used(sweep: Sweep) -> str:
    several = "sign-flip permutation over problems"
    return several if most_seeds(sweep) > 1 else f"exact McNemar for 0/1 scores, otherwise {several}"
