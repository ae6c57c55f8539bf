"""Denoising as a terminal shows it: the response after each step, masks as blocks, confidence as colour.

    ░░  a mask     bold on colour  committed in this step     underlined  another token than full precision's
    ∎   an end of text             "committed at"             the lowest confidence of this step
    colour of a token: its confidence when it was committed, from orange (0) over yellow to turquoise (1)

Functions here turn frames into rich renderables or plain lines; generate.py makes the frames and the Live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

MASK, NARROW_MASK, WIDE_UP_TO = "░░ ", "░", 128  # positions
_GRADIENT = ((230, 97, 1), (240, 196, 25), (53, 182, 200))  # confidence 0, 1/2, 1


@dataclass(frozen=True)
class Frame:
    """A response right after the commit of one denoising step; lists have one entry per position.

    Attributes:
        step: 0-based; -1 before the first one. A step that commits nothing may have no frame.
        num_steps: the sampler's.
        forwards: model calls so far.
        ids: tokens, None where still masked.
        pieces: their texts.
        confidence: of each token when it was committed, 0 at masks.
        fresh: committed in this step.
    """

    step: int
    num_steps: int
    forwards: int
    ids: Sequence[int | None]
    pieces: Sequence[str]
    confidence: Sequence[float]
    fresh: Sequence[bool]

    @property
    def masked(self) -> int:
        return sum(token is None for token in self.ids)

    @property
    def mask_ratio(self) -> float:
        return self.masked / len(self.ids)


@dataclass(frozen=True)
class Comparison:
    """Two runs from the same prompt: where the final responses differ, and when the runs first did.

    Attributes:
        differs: by position, of the final tokens.
        step: first step after which the states differ (a token against a mask counts), None: never.
        mask_ratio: full precision's, in the state that this step saw.
        position: the first position that differs after this step.
    """

    differs: Sequence[bool]
    step: int | None
    mask_ratio: float
    position: int

    @property
    def agreement(self) -> float:
        return 1 - sum(self.differs) / len(self.differs)


def state_at(frames: Sequence[Frame], step: int) -> Frame:
    """The run's state after `step`: its latest frame up to there."""
    return next(frame for frame in reversed(frames) if frame.step <= step)


def compare(reference: Sequence[Frame], other: Sequence[Frame]) -> Comparison:
    """Compares two runs, each from its frame -1 on."""
    differs = [a != b for a, b in zip(reference[-1].ids, other[-1].ids, strict=True)]
    for step in range(reference[0].num_steps):
        a, b = state_at(reference, step).ids, state_at(other, step).ids
        if a != b:
            position = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            return Comparison(differs, step, state_at(reference, step - 1).mask_ratio, position)
    return Comparison(differs, None, 0.0, 0)


def differing(reference: Frame, other: Frame) -> list[bool]:
    """Where both runs have committed a token, and not the same one."""
    pairs = zip(reference.ids, other.ids, strict=True)
    return [a is not None and b is not None and a != b for a, b in pairs]


def colour(confidence: float) -> str:
    """A rich colour for a probability."""
    place = 2 * min(max(confidence, 0.0), 1.0)
    low, high = _GRADIENT[0 if place < 1 else 1], _GRADIENT[1 if place < 1 else 2]
    mixed = (round(a + (b - a) * (place % 1 if place < 2 else 1)) for a, b in zip(low, high, strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def draw_response(frame: Frame, end_ids: Sequence[int], differs: Sequence[bool] | None = None) -> Text:
    """The canvas: masks as dim blocks, tokens in the colour of their confidence; ends of text are dim."""
    text, mask = Text(), MASK if len(frame.ids) <= WIDE_UP_TO else NARROW_MASK
    for i, (token, piece) in enumerate(zip(frame.ids, frame.pieces, strict=True)):
        if token is None:
            text.append(mask, "dim")
            continue
        mark = " underline" if differs is not None and differs[i] else ""
        tint = colour(frame.confidence[i])
        style = f"bold black on {tint}" if frame.fresh[i] else tint
        if token in end_ids:
            text.append("∎", (style if frame.fresh[i] else "dim") + mark)
            continue
        text.append(piece.replace("\n", "↵\n") if frame.fresh[i] else piece, style + mark)
    return text


def draw_run(
    title: str, frame: Frame, end_ids: Sequence[int], differs: Sequence[bool] | None = None
) -> Panel:
    """A panel with the canvas and, below, where the run is."""
    share = 1 - frame.mask_ratio
    bar = "━" * round(20 * share)
    status = Text(f"step {frame.step + 1:>3}/{frame.num_steps}  masked {frame.masked:>3}/{len(frame.ids)}\n")
    status.append(bar, colour(1.0)).append("━" * (20 - len(bar)), "bright_black")
    fresh = [c for c, new in zip(frame.confidence, frame.fresh, strict=True) if new]
    if fresh:
        status.append(f"  committed at {min(fresh):.2f} or more", colour(min(fresh)))
    return Panel(
        Group(draw_response(frame, end_ids, differs), Text(), status), title=title, title_align="left"
    )


def draw_screen(prompt: str, panels: Sequence[Panel], notes: Sequence[str] = ()) -> RenderableType:
    """The prompt, the runs side by side, what the signs mean, and what is to be said at the end."""
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    lines = [_legend(len(panels) > 1), *(Text(note) for note in notes)]
    return Group(Panel(Text(prompt.strip()), title="prompt", title_align="left", style="dim"), grid, *lines)


def trace_line(name: str, frame: Frame) -> str:
    """A step as one plain line: what was committed, and how sure the model was."""
    fresh = [
        f"{i}:{piece!r} {confidence:.2f}"
        for i, (piece, confidence, new) in enumerate(
            zip(frame.pieces, frame.confidence, frame.fresh, strict=True)
        )
        if new
    ]
    return (
        f"{name}  step {frame.step + 1:>3}/{frame.num_steps}  masked {frame.masked:>3}/{len(frame.ids)} "
        f"({frame.mask_ratio:4.0%})  {'  '.join(fresh) or 'nothing committed'}"
    )


def describe(comparison: Comparison, reference: Sequence[Frame], other: Sequence[Frame]) -> str:
    """The comparison in one sentence."""
    n, same = len(comparison.differs), len(comparison.differs) - sum(comparison.differs)
    text = f"agreement {same} of {n} positions ({comparison.agreement:.1%})"
    if comparison.step is None:
        return f"{text}; the two runs never differ."
    where = comparison.position
    a, b = (_at(state_at(frames, comparison.step), where) for frames in (reference, other))
    return (
        f"{text}; the runs first differ at step {comparison.step + 1} of {reference[0].num_steps} (mask "
        f"ratio {comparison.mask_ratio:.2f}), position {where}: {a} in full precision, {b} in the quantized "
        "model."
    )


def _at(frame: Frame, position: int) -> str:
    return "a mask" if frame.ids[position] is None else repr(frame.pieces[position])


def _legend(compared: bool) -> Text:
    text = Text("confidence ", "dim")
    for share in (0.0, 0.5, 1.0):
        text.append(f"{share:g} ", colour(share))
    words = " ∎ end of text" + ("  underlined: not full precision's token" if compared else "")
    return text.append(words, "dim")
