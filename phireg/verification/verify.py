"""Proving a checkpoint to be its source."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from phireg.registry import AUTO
from phireg.verification.result import CHECKS, Verification


def verify(
    checkpoint_dir: str | Path,
    model_dir: str | Path,
    *,
    family: str = AUTO,
    revision: str | None = None,
    checks: Collection[str] = tuple(CHECKS),
    device: str = "cpu",
    dtype: str = "float32",
    max_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Prove a checkpoint to be its source, or say where it is not; see docs/verify.md.

    Args:
        checkpoint_dir: the checkpoint, whoever made it.
        model_dir: the source: a directory, or a repository on the Hugging Face hub.
        family: as for :func:`plan`.
        revision: branch, tag or commit of a hub repository.
        checks: names out of ``phireg.verification.result.CHECKS``.
        device: where logits are computed, ``cpu`` or ``cuda``.
        dtype: in which dtype; float32 compares sharpest.
        max_tokens: most tokens of a prompt; None for what a stated budget allows.
        progress: told (check, how much more is done, how much there is in all), perhaps from
            worker threads: bytes of ``weights``, layers of ``logits`` and ``ranks``.

    Raises:
        UsageError: an unknown check, device or dtype.
        SourceError: the checkpoint is none, or the source cannot be read.
        PluginError: the family cannot be found or loaded.
    """
    from phireg.verification.request import Request
    from phireg.verification.run import run

    request = Request(
        Path(checkpoint_dir), str(model_dir), family, revision, checks, device, dtype, max_tokens
    )
    return run(request, progress)
