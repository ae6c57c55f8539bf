"""A hub id: asked once, quickly; from the cache where nothing answers, one sentence where that is empty."""

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from dllmq.models.hub import hub_folder
from dllmq.models.loading import checkpoint_folder

NAME = "org/name"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As without HF_HUB_OFFLINE, which all tests run under; an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_folder.cache_clear()
    yield monkeypatch
    hub_folder.cache_clear()


def in_cache(tmp_path: Path) -> Path:
    """A repository as the hub's client keeps it."""
    own = tmp_path / "hub" / "models--org--name"
    folder = own / "snapshots" / ("a" * 40)
    for place in (own / "refs", folder):
        place.mkdir(parents=True)
    (own / "refs" / "main").write_text("a" * 40)
    (folder / "config.json").write_text("{}")
    return folder


def answers(online: pytest.MonkeyPatch, error: Exception | None) -> list[float]:
    """The hub answers a question for a header so; returns the time limits of the questions."""
    asked = []

    def ask(url: str, timeout: float) -> None:
        assert url.endswith("/org/name/resolve/main/config.json")
        asked.append(timeout)
        if error is not None:
            raise error

    online.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    return asked


def test_a_hub_that_does_not_answer_is_told_of_in_seconds(online: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and says nothing; the hub's client would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        online.setattr(constants, "ENDPOINT", endpoint)
        online.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        online.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        started = time.monotonic()
        with pytest.raises(ValueError) as caught:
            checkpoint_folder(NAME)
        assert time.monotonic() - started < 10
    text = str(caught.value)
    assert "\n" not in text and text.endswith("give its folder.")
    assert f"{NAME} is no local folder" in text and f"{endpoint} cannot be reached (ReadTimeout" in text


def test_the_cache_stands_in_for_a_hub_that_cannot_be_reached(
    online: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, asked = in_cache(tmp_path), answers(online, ConnectionError("no route"))
    with caplog.at_level(logging.WARNING):
        assert [checkpoint_folder(NAME) for _ in range(3)] == 3 * [folder]
    assert len(asked) == len(caplog.records) == 1  # once a process, however often the folder is wanted
    assert "cannot be reached (ConnectionError: no route)" in caplog.text


@pytest.mark.parametrize("status", [None, 401, 404, 429, 500, 503])
def test_a_hub_that_answers_is_left_to_its_own_client(online: pytest.MonkeyPatch, status: int | None) -> None:
    """Also where the answer is a refusal; with an error of the server there is no answer."""
    error = RuntimeError("refused")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    answers(online, None if status is None else error)
    local = []

    def download(repository: str, allow_patterns: list[str], local_files_only: bool) -> str:
        local.append(local_files_only)
        return "/folder"

    online.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint_folder(NAME) == Path("/folder") and local == [status in (500, 503)]


def test_offline_the_hub_is_not_asked(online: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
    folder, asked = in_cache(tmp_path), answers(online, None)
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_folder(NAME) == folder and asked == [] and caplog.records == []
    with pytest.raises(ValueError, match=r"other/name is no local folder.* HF_HUB_OFFLINE is set: check"):
        checkpoint_folder("other/name")
