"""A checkpoint of the hub as a local folder: asked once, quickly, before anything is downloaded.

The hub's client retries for minutes where nothing answers, and each call anew. So the hub is asked for
config.json's header first; where that fails, what is in the Hugging Face cache is used, or it is said.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


@cache
def hub_folder(repository: str) -> Path:
    """The folder of a repository in the Hugging Face cache, downloaded where the hub has a newer one.

    A process asks once, so all it does is of one state of the repository.

    Args:
        repository: owner/name.

    Raises:
        ValueError: it is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download

    reason = unreachable(repository)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=bool(reason)))
    except Exception as error:  # of the network, the hub, the disk or the name: the remedies are the same
        why = reason or f"the hub does not give it ({_in_short(error)})"
        raise ValueError(
            f"model {repository} is no local folder, is not in the Hugging Face cache, and {why}: check the "
            "name and the network (HF_ENDPOINT names a mirror), or download it elsewhere and give its folder."
        ) from error
    if reason and not _offline():
        log.warning(
            "%s is taken from the Hugging Face cache: %s (HF_HUB_OFFLINE=1 does not ask)", repository, reason
        )
    return folder


def unreachable(repository: str) -> str:
    """Why the hub does not answer; "" where it does, if only to say that there is no such repository.

    It is waited for as long as HF_HUB_ETAG_TIMEOUT says, 10 seconds by default.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if _offline():
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # which classes depends on the client's version
        status = getattr(getattr(error, "response", None), "status_code", 500)
        return f"{constants.ENDPOINT} cannot be reached ({_in_short(error)})" if status >= 500 else ""
    return ""


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _in_short(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0][:160].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
