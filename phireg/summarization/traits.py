"""What a run's results belong to, and what a reader of its report should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from phireg.summarization.contestants import Contestant
from phireg.summarization.resultsfile import model_digest
from phireg.summarization.run import Task
from phireg.summarization.task import samples_digest

_PACKAGES = ("phireg", "torch", "transformers", "rouge-score")


def identity(contestants: Sequence[Contestant], task: Task, *, digests: bool) -> dict[str, Any]:
    """Settings, models, data and versions, as JSON.

    Args:
        contestants: the backends.
        task: what they are given.
        digests: read the models' files whole, to tell other weights of the same name.
    """
    return {
        "settings": asdict(task.settings),
        "stop_ids": sorted(task.stop_ids),
        "articles": len(task.samples),
        "data": samples_digest(task.samples),
        "backends": {
            one.name: {
                "place": str(one.place),
                "options": asdict(one.options),
                "files": model_digest(one.place) if digests else None,
            }
            for one in contestants
        },
        "versions": {name: version(name) for name in _PACKAGES},
    }


def provenance(told: Mapping[str, Any], data: str) -> tuple[tuple[str, str], ...]:
    """Label and value pairs for people, of an ``identity``."""
    settings = told["settings"]
    rows = [
        ("data", f"{data}: {told['articles']} articles"),
        ("digest of texts and prompts", f"sha256 {told['data']}"),
        ("settings", ", ".join(f"{key} {value}" for key, value in settings.items())),
    ]
    for name, one in told["backends"].items():
        dtype = one["options"]["dtype"] or "the model's own dtype"
        rows.append((name, f"{one['place']} ({dtype}, device {one['options']['device']})"))
        rows += [
            (f"{name}: {file}", f"xxh3_128 {digest}")
            for file, digest in (one["files"] or {}).items()
        ]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in told["versions"].items())))
    return tuple(rows)
