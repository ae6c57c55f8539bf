"""Frames of two runs: what is drawn of them, and where they part, which is divergence.py's definition."""

import io
import re

import pytest
import torch
from rich.console import Console, RenderableType

from dllmq.report.denoising import (
    Frame,
    colour,
    compare,
    describe,
    differing,
    draw_response,
    draw_run,
    draw_screen,
    state_at,
    trace_line,
)

END = 9


def run(*states: tuple[int, list[int | None]], num_steps: int = 4) -> list[Frame]:
    """Frames of (step, tokens after it); token t is written "t<t> ", its confidence is t / 10."""
    frames = [Frame(-1, num_steps, 0, [None] * 4, [""] * 4, [0.0] * 4, [False] * 4)]
    for step, ids in states:
        fresh = [a is None and b is not None for a, b in zip(frames[-1].ids, ids, strict=True)]
        pieces = ["" if t is None else f"t{t} " for t in ids]
        confidence = [0.0 if t is None else t / 10 for t in ids]
        frames.append(Frame(step, num_steps, step + 1, ids, pieces, confidence, fresh))
    return frames


A = run((0, [1, None, None, None]), (1, [1, 2, None, None]), (2, [1, 2, 3, None]), (3, [1, 2, 3, END]))
B = run((0, [1, None, None, None]), (1, [1, None, 4, None]), (3, [1, 2, 4, END]))


def shown(renderable: RenderableType, width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(renderable)
    return console.export_text()


def test_runs_part_where_their_states_first_differ() -> None:
    found = compare(A, B)
    assert found.differs == [False, False, True, False] and found.agreement == 0.75
    assert (found.step, found.mask_ratio, found.position) == (1, 0.75, 1)  # a token against a mask counts
    assert describe(found, A, B) == (
        "agreement 3 of 4 positions (75.0%); the runs first differ at step 2 of 4 (mask ratio 0.75), "
        "position 1: 't2 ' in full precision, a mask in the quantized model."
    )


def test_equal_runs_never_part_even_if_one_has_frames_more() -> None:
    fewer = [frame for frame in A if frame.step != 1]
    assert compare(A, A).step is None and compare(A, A).agreement == 1
    assert describe(compare(A, A), A, A) == "agreement 4 of 4 positions (100.0%); the two runs never differ."
    assert compare(A, fewer).step == 1  # behind by one step
    assert state_at(fewer, 1) is fewer[1] and state_at(A, -1) is A[0]


def test_only_committed_tokens_are_called_different() -> None:
    assert differing(A[2], B[2]) == [False] * 4  # tokens against masks, and masks
    assert differing(A[3], B[3]) == [False, False, True, False]


def test_a_canvas_shows_blocks_tokens_and_ends_of_text() -> None:
    assert draw_response(A[2], [END]).plain == "t1 t2 ░░ ░░ "
    assert draw_response(A[4], [END]).plain == "t1 t2 t3 ∎"
    styles = [str(span.style) for span in draw_response(B[2], [END], [True, False, False, False]).spans]
    assert styles[0] == f"{colour(0.1)} underline" and styles[1] == "dim"
    assert styles[2] == f"bold black on {colour(0.4)}"


def test_a_wide_canvas_has_narrow_masks() -> None:
    wide = Frame(-1, 8, 0, [None] * 200, [""] * 200, [0.0] * 200, [False] * 200)
    assert draw_response(wide, []).plain == "░" * 200


def test_a_panel_tells_step_masks_and_the_lowest_confidence() -> None:
    text = shown(draw_run("GPTQ w2a4", A[2], [END]))
    assert "GPTQ w2a4" in text and re.search(r"step +2/4 +masked +2/4", text)
    assert "committed at 0.20" in text
    assert "committed" not in shown(draw_run("fp", A[0], [END]))


def test_markup_in_texts_is_text() -> None:
    frame = Frame(0, 1, 1, [1], ["[bold]x[/nope]"], [1.0], [False])
    screen = draw_screen("[red]prompt", [draw_run("a", frame, []), draw_run("b", frame, [])], ["[i]note"])
    text = shown(screen, 120)
    assert text.count("[bold]x[/nope]") == 2 and "[red]prompt" in text and "[i]note" in text
    assert "∎ end of text" in text and "underlined: not full precision's token" in text
    assert "underlined" not in shown(draw_screen("alone", [draw_run("a", frame, [])]), 120)


def test_a_trace_line_names_what_a_step_committed() -> None:
    line = trace_line("full precision", A[2])
    assert line == "full precision  step   2/4  masked   2/4 ( 50%)  1:'t2 ' 0.20"
    assert trace_line("q", A[0]).endswith("nothing committed")


@pytest.mark.parametrize("p", torch.linspace(-0.1, 1.1, 13).tolist())
def test_colours_are_colours_and_change_with_confidence(p: float) -> None:
    values = [int(v) for v in re.findall(r"\d+", colour(p))]
    assert len(values) == 3 and all(0 <= v <= 255 for v in values)
    assert colour(0.0) == "rgb(230,97,1)" and colour(0.5) == "rgb(240,196,25)"
    assert colour(1.0) == "rgb(53,182,200)" and len({colour(i / 10) for i in range(11)}) == 11
