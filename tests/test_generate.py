"""python -m dllmq.generate: its text is the sampler's, its runs divergence.py's, wrong input one sentence."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_checkpoint import save_checkpoint

from dllmq import generate as program
from dllmq.calibration.states import record_trajectories
from dllmq.checkpoint import save_quantized
from dllmq.config import EMBEDDED, compose_plan, preset_of
from dllmq.diffusion import generate
from dllmq.evaluation.divergence import measure_divergence
from dllmq.mini.tasks import problems
from dllmq.models.streaming import is_streamed
from dllmq.pipeline import quantized_linears
from dllmq.report.denoising import compare

PROMPT = "Question: Olga has 3 books. How many books?\nAnswer:"
SAMPLER = ["sampler.gen_length=16", "sampler.steps=8", "sampler.block_length=8"]
CALIBRATION = ["calibration.num_prompts=2", "calibration.num_states=4", "eval.fidelity_prompts=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def quantizing(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = f"cache_dir={tmp_path_factory.mktemp('cache')}"
    return [*SAMPLER, *CALIBRATION, cache, "method=rtn", "bits=w2a4"]


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert program.main(list(argv)) == 0
    return capsys.readouterr().out


def runner(folder: Path, *overrides: str) -> program.Runner:
    args = program.arguments(["--model", str(folder), *overrides])
    return program.load(compose_plan(program.all_overrides(args)[0]), PROMPT)


def test_a_pipe_gets_the_samplers_text_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runner(folder, *SAMPLER)
    tokens = generate(made.model, made.prompt_ids[None], made.plan.recipe.sampler).tokens[0, -16:].tolist()
    end = next((i for i, t in enumerate(tokens) if t in made.end_ids), 16)
    expected = made.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    assert output(capsys, PROMPT, "--model", str(folder), *SAMPLER) == expected + "\n"


def test_frames_are_the_steps_of_the_one_loop(folder: Path) -> None:
    made = runner(folder, *SAMPLER)
    frames = list(made.frames())
    recorded = record_trajectories(made.model, [made.prompt_ids], made.plan.recipe.sampler, 1)[0]
    assert frames[0].masked == 16 and [f.step for f in frames[1:]] == recorded.step.tolist()
    for frame, committed, score in zip(frames[1:], recorded.committed, recorded.score, strict=True):
        assert frame.fresh == committed[-16:].tolist()
        at = committed[-16:]
        assert torch.tensor(frame.confidence)[at].tolist() == score[-16:][at].tolist()
    assert frames[-1].ids == recorded.final[-16:].tolist()


def test_noise_is_the_same_in_every_run_and_another_by_seed(folder: Path) -> None:
    made = runner(folder, *SAMPLER, "sampler.temperature=1.5")
    first, again = (list(made.frames())[-1].ids for _ in range(2))
    other = runner(folder, *SAMPLER, "sampler.temperature=1.5", "seed=1")
    assert first == again and first != list(other.frames())[-1].ids


def test_the_chat_template_is_left_out_where_asked_for(folder: Path) -> None:
    bare = runner(folder, *SAMPLER).prompt_ids
    with pytest.raises(ValueError, match=r"has none .* set tasks\.chat_template=false"):
        runner(folder, *SAMPLER, "model.chat_template=true")
    assert runner(folder, *SAMPLER, "model.chat_template=true", "tasks.chat_template=false").prompt_ids.equal(
        bare
    )


def test_keys_without_effect_are_told_beside_the_answer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointless = ["seed=1", "sampler.threshold=1.5", "eval.limit=3"]
    assert program.main([PROMPT, "--model", str(folder), *SAMPLER, *pointless]) == 0
    told = [line.split(": ")[:3] for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert told == [
        ["dllmq.generate", "no effect", key] for key in ("seed", "eval.limit", "sampler.threshold")
    ]


@pytest.mark.parametrize("word", ["cache=dual", "threshold=0.9"])
def test_approximate_decoding_is_told_beside_the_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert program.main([PROMPT, "--model", str(folder), *SAMPLER, f"sampler.{word}"]) == 0
    assert f"dllmq.generate: approximate decoding: {word}\n" in capsys.readouterr().err


def test_trace_has_a_line_per_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, PROMPT, "--trace", "--model", str(folder), *SAMPLER).splitlines()
    assert [line.split("masked")[0].split() for line in lines[:8]] == [
        ["full", "precision", "step", f"{i}/8"] for i in range(1, 9)
    ]
    places = [int(p) for line in lines[:8] for p in re.findall(r"  (\d+):", line)]
    assert sorted(places) == list(range(16))  # every position is committed once


def test_side_by_side_compares_as_divergence_does(
    folder: Path, quantizing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = runner(folder, *quantizing)
    sampler = made.plan.recipe.sampler
    reference = record_trajectories(made.model, [made.prompt_ids], sampler, 1)
    before = list(made.frames())
    assert program.quantize_in_place(made, lambda *_: None) == "RTN w2a4"
    after = list(made.frames())
    found, expected = compare(before, after), measure_divergence(
        made.model, reference, [made.prompt_ids], sampler, 1
    ).values  # fmt: skip
    assert found.step == expected["first_divergence_step"]["value"]
    assert found.agreement == pytest.approx(expected["final_agreement"]["value"])
    assert found.mask_ratio == pytest.approx(expected["first_divergence_mask_ratio"]["value"])
    out = output(capsys, PROMPT, "--side-by-side", "--model", str(folder), *quantizing)
    texts = (
        f"--- full precision\n{made.text(before[-1])}\n--- RTN w2a4\n{made.text(after[-1])}\n--- agreement "
    )
    assert out.startswith(texts)


def test_a_terminal_sees_both_canvases_and_the_verdict(folder: Path, quantizing: list[str]) -> None:
    console = Console(record=True, force_terminal=True, width=120, file=io.StringIO())
    args = program.arguments([PROMPT, "--side-by-side", "--delay", "0", "--model", str(folder), *quantizing])
    program.generate(args, console)
    text = console.export_text()
    assert "Question: Olga has 3 books" in text and "full precision" in text and "RTN w2a4" in text
    assert "░░ ░░" in text and re.search(r"agreement \d+ of 16 positions", text)
    assert re.search(r"step +8/8 +masked +0/16", text)


def test_text_after_an_end_of_text_survives_where_asked_for(folder: Path) -> None:
    made = runner(folder, *SAMPLER)
    frame = list(made.frames())[-1]
    word = made.tokenizer.convert_tokens_to_ids("Question")
    ids = [word, made.end_ids[0], *[word] * 14]
    changed = program.replace(frame, ids=ids)
    assert made.text(changed) == "Question"
    survivor = runner(folder, *SAMPLER, "eval.eos_cut=none")
    assert survivor.text(changed) == "Question" * 15


@pytest.fixture(scope="module")
def exported(folder: Path, quantizing: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, path = runner(folder, *quantizing), tmp_path_factory.mktemp("export") / "model"
    program.quantize_in_place(made, lambda *_: None)
    save_quantized(made.model, path, "compressed_tensors", folder)
    return path


def test_an_export_runs_as_it_is_stored(
    folder: Path, exported: Path, quantizing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = output(capsys, PROMPT, "--trace", "--model", str(folder), *quantizing, "backend=fake")
    for memory in ("whole", "stream"):
        given = ("--trace", "--model", str(exported), *SAMPLER, "backend=fake", f"memory={memory}")
        back = output(capsys, PROMPT, *given)
        assert back.startswith("as stored") and "full precision" not in back
        assert [line.split("step")[1:] for line in back.splitlines()] == [
            line.split("step")[1:] for line in own.splitlines()
        ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bits=w4a4", "is quantized already; give the full-precision checkpoint"),
        ("--side-by-side", "is quantized already"),
    ],
)
def test_what_an_export_does_not_take(
    exported: Path, word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([PROMPT, "--model", str(exported), *SAMPLER, word]) == 1
    assert said in capsys.readouterr().err


def test_a_damaged_export_is_refused_before_weights_are_read(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    record = tmp_path / "dllmq_quantization.json"
    record.write_text(record.read_text().replace("q_proj", "x_proj"))
    with pytest.raises(ValueError, match="x_proj, which is no linear of a block"):
        compose_plan(["method=fp", "tracker=none", f"model.path={tmp_path}"], stored=True)


def test_memory_is_as_in_a_run_and_changes_no_token(
    folder: Path, quantizing: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dllmq")
    whole = runner(folder, *quantizing, "memory=whole")
    streamed = runner(folder, *quantizing, "memory=stream", "max_state_bytes=0")
    assert is_streamed(streamed.model) and not is_streamed(whole.model)
    for made, compact in ((whole, False), (streamed, True)):
        caplog.clear()
        program.quantize_in_place(made, lambda *_: None)
        assert {linear.is_compact for linear in quantized_linears(made.model).values()} == {compact}
        cache = str(made.plan.config.cache_dir)
        spilled = [line for line in caplog.messages if line.endswith(f"on disk, in {cache}")]
        assert len(spilled) == compact
    assert [f.ids for f in whole.frames()] == [f.ids for f in streamed.frames()]


def test_the_chat_template_wraps_the_prompt(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "chat")
    (folder / "chat_template.jinja").write_text((EMBEDDED / "chat_template.jinja").read_text())
    plain, chat = (
        runner(folder, *SAMPLER, f"model.chat_template={on}").prompt_ids.tolist() for on in ("false", "true")
    )
    text = runner(folder, *SAMPLER).tokenizer.decode(chat)
    assert len(chat) > len(plain) and "<|start_header_id|>user" in text and text.count("<|startoftext|>") == 1


def test_the_prompt_comes_from_the_words_stdin_or_the_dev_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert program.read_prompt("x = 1") == "x = 1"
    assert program.read_prompt(r"$\nabla f$" + "\nAnswer:") == "$\\nabla f$\nAnswer:"
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n"))
    assert program.read_prompt("-") == "from stdin\n"
    assert program.read_prompt(None) == f"Question: {problems('mini_gsm', 'dev', 1)[0]['question']}\nAnswer:"


@pytest.mark.parametrize(
    ("words", "prompt", "overrides", "quantized"),
    [
        ([], None, [], False),
        (["Solve x=3"], "Solve x=3", [], False),
        (["sampler.steps=24", "seed=1", "a b"], "a b", ["sampler.steps=24", "seed=1"], False),
        (["bits=w4a4"], None, ["bits=w4a4"], True),
        (["method=awq", "tmas=true", "-"], "-", ["method=awq", "tmas=true"], True),
        (["--side-by-side"], None, [], True),
        (["+calibration.data=x"], None, ["+calibration.data=x"], True),
        *(([word], None, [word], False) for word in ("memory=stream", "max_state_bytes=0", "backend=fake")),
    ],
)
def test_which_words_are_overrides_and_which_ask_to_quantize(
    words: list[str], prompt: str | None, overrides: list[str], quantized: bool
) -> None:
    args = program.arguments(words)
    assert (args.prompt, args.overrides) == (prompt, overrides)
    said, asked = program.all_overrides(args)
    assert asked == quantized and ("method=fp" in said) == (not quantized) and "tracker=none" in said


def test_a_published_id_brings_its_preset_along() -> None:
    assert preset_of("Dream-org/Dream-v0-Instruct-7B") == "dream_v0_7b_instruct"
    assert preset_of("somebody/else") is None
    args = program.arguments(["--model", "GSAI-ML/LLaDA-8B-Instruct"])
    assert "model=llada_8b_instruct" in program.all_overrides(args)[0]
    odd = program.arguments(["--model", "/ckpt/it's=here"])
    assert "model.path='/ckpt/it\\'s=here'" in program.all_overrides(odd)[0]


def test_an_export_brings_the_preset_along_that_it_was_made_with(tmp_path: Path) -> None:
    record, own = tmp_path / "dllmq_quantization.json", f"model.path='{tmp_path}'"

    def overrides(*more: str) -> list[str]:
        return program.all_overrides(program.arguments(["--model", str(tmp_path), *more]))[0]

    named = '{"run": {"config": {"model": {"name": "%s"}}}}'
    record.write_text(named % "dream_v0_7b_instruct")
    assert {"model=dream_v0_7b_instruct", own} <= set(overrides())
    chosen = overrides("model=dream_v0_7b_base")
    assert [word for word in chosen if word.startswith("model=")] == ["model=dream_v0_7b_base"]
    for text in (named % "no_such", named % "mini,rm", '{"run": [1]}', "[" * 9999, "nonsense", "null"):
        record.write_text(text)
        assert own in overrides() and not [word for word in overrides() if word.startswith("model=")]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sampler.steps=7"], "steps (the total) must be a multiple of the number of blocks"),
        (["metod=gptq"], "there is no key metod. Did you mean method?"),
        (["method=awqq"], "method=awqq is not known. Did you mean awq?"),
        (["experiment=ablatio"], "experiment=ablatio is not known. Did you mean ablation?"),
        (["bits=w1a4"], "bits=w1a4 is not a width"),
        (["--model", "/no/such/folder"], "model path /no/such/folder does not exist"),
        ([" "], "the prompt is empty"),
        (["a " * 300], "tokens and gen_length is 48, together more than the model's 256"),
        (["sampler.remasking=entropy"], "remasking=entropy"),
        (["sampler.steps="], "sampler.steps"),
        (["export=gptq"], "export= writes nothing here: export with python -m dllmq.run"),
    ],
)
def test_wrong_input_is_one_sentence(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1 and err.startswith("dllmq.generate: ")


@pytest.mark.parametrize("argv", [["one", "two"], ["--nope"], ["--delay", "-1"], ["--delay", "x"]])
def test_arguments_that_cannot_be_parsed_exit_with_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(argv)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err
