"""What Hydra refuses is one sentence with the nearest allowed word; each text is Hydra's own."""

import sys
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

import dllmq.run
from dllmq.config import compose_plan, refused
from dllmq.report.callback import HYDRAS


def sentence(*words: str) -> str:
    """Of a command line that Hydra itself refuses."""
    with initialize_config_module("dllmq.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            hydra.compose_config("config", list(words), run_mode=RunMode.RUN)
        except HYDRAS as error:
            found = error
        else:
            pytest.fail("Hydra takes it")
    text = refused(found, words)
    assert "\n" not in text and text.endswith((".", "]")) and "Config search path" not in text
    return text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["metod=gptq"], "there is no key metod. Did you mean method? Known: tmas, cgq, iaaq, "),
        (["mehtod.damp=1"], "there is no key mehtod. Did you mean method?"),
        (["eval.limt=3"], "there is no key eval.limt. Did you mean limit? Known: limit, batch_size, "),
        (["method=awq", "method.slover=x"], "there is no key method.slover. Did you mean solver?"),
        (["seed.x=3"], "there is no key seed.x: seed is a value and holds none."),
        (["~fo"], "there is no key fo."),
        (["method=gptqq"], "method=gptqq is not known. Did you mean gptq? Known: awq, fp, gptq, rtn."),
        (["hydra/launcher=dllmq_jolib"], "hydra/launcher=dllmq_jolib is not known. Did you mean"),
        (["hydra/launchr=ray"], "there is no group hydra/launchr. Did you mean hydra/launcher?"),
        (["hydra.verbse=true"], "there is no key hydra.verbse. Did you mean verbose?"),
        (["+x"], "+x gives no value: write +x=<value>."),
        (["seed=1", "bits=[w4a4"], "bits=[w4a4 cannot be read (no viable alternative at input '[w4a4')"),
        (["name='"], "name=' cannot be read ("),
        (["method=gptq,rtn"], "method=gptq,rtn holds a comma: sweep over the values with -m"),
        (["+method=gptq"], "method is chosen already: give method=<name> without the +"),
        (["+seed=3"], "seed is there already: give seed=<value> without the +."),
        (["hydra.mode=foo"], "hydra.mode=foo is not allowed: Invalid value 'foo', expected one of [RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_refused_command_line_is_one_sentence(words: list[str], said: str) -> None:
    assert sentence(*words).startswith(said)


def test_entry_points_without_hydra_say_the_same() -> None:
    with pytest.raises(ValueError, match=r"^there is no key metod\. Did you mean method\?"):
        compose_plan(["metod=gptq"])


def started(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The whole command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["run", *words])
    monkeypatch.setattr(dllmq.run, "start_logging", lambda *_: None)
    monkeypatch.setattr(dllmq.run, "_given", "")
    with pytest.raises(SystemExit) as ended:
        dllmq.run.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["metod=gptq"], "there is no key metod. Did you mean method?"),
        (["-m", "metod=gptq,rtn"], "cell 1 of 2 (metod=gptq): there is no key metod. Did you mean method?"),
        (["--config-dir=bad", "method=broken"],
         "bad/method/broken.yaml is no valid YAML (expected ',' or ']', but got '<stream end>', line 2)"),
        (["--config-dir=none"], "none' not found"),
    ],
    ids=["key", "cell", "yaml", "folder"],
)  # fmt: skip
def test_the_command_says_it_and_ends_with_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad" / "method").mkdir(parents=True)
    (tmp_path / "bad" / "method" / "broken.yaml").write_text("a: [1, 2\n")
    assert started(monkeypatch, *words) == 1
    out, err = capsys.readouterr()
    assert said in err and len(err.splitlines()) == 1 and out == ""
    assert not (tmp_path / "outputs").exists()


def test_a_failure_of_the_programs_own_can_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """HYDRA_FULL_ERROR=1 still shows where Hydra stopped."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["run", "metod=gptq"])
    monkeypatch.setattr(dllmq.run, "start_logging", lambda *_: None)
    with pytest.raises(HYDRAS):
        dllmq.run.main()
