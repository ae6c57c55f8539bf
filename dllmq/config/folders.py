"""Names of the folders of sweeps and cells, from their overrides."""

from __future__ import annotations

import hashlib
import os
import re


def slug(text: str, limit: int = 100) -> str:
    """A folder name for a list of overrides: readable, and distinct where it had to be cut."""
    clean = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text).strip("_.") or "default"
    if len(clean) <= limit:
        return clean
    return f"{clean[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sweep_folder(overrides: list[str]) -> str:
    """outputs/<name>, or outputs/<the overrides> so that the same command finds its folder again."""
    named = [o.partition("=")[2] for o in overrides if o.startswith("name=")]
    ignored = ("name=", "resume=", "dry_run=", "threads=", "cache_dir=", "tracker=", "hydra.", "hydra/")
    text = "_".join(o for o in overrides if not o.startswith(ignored))
    experiment = [o.partition("=")[2] for o in overrides if o.startswith(("experiment=", "+experiment="))]
    if not named and experiment and len([o for o in overrides if not o.startswith(ignored)]) == 1:
        named = experiment
    return os.path.join("outputs", slug(named[-1] if named and named[-1] != "null" else text))


def cell_name(override_dirname: str | None) -> str:
    """A cell's folder: its overrides, top-level keys first, so that these survive where it is cut."""
    parts = re.split(r",(?=[A-Za-z_.]+=)", override_dirname or "")
    return slug(",".join(sorted(parts, key=lambda part: "." in part.partition("=")[0])))
