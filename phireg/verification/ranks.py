"""TP n in lockstep against the same ranks merged into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from phireg.executor import Executor
from phireg.executor.model import Source
from phireg.verification.measure import logits_tolerance, overall, token_errors
from phireg.verification.measure_types import Place
from phireg.verification.merge import merged_executor
from phireg.verification.prompts import prompt_ids


def compare_ranks(
    executor: Executor,
    sources: Sequence[Source],
    tokens: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, float, Place | None]:
    """Run both on one prompt.

    Args:
        executor: all ranks in lockstep.
        sources: its ranks' tensors by name.
        tokens: of the prompt.
        progress: told how many more layers have been computed, of one and then of the other.

    Returns:
        The relative error of the logits, what it may reach, and the first sub-module whose output
        is off by more (None when all agree, or when only the logits do not).
    """
    spec = executor.spec
    ids = prompt_ids(spec.vocab_size, tokens).to(executor.device)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    tolerance = logits_tolerance(executor.dtype, spec.num_layers)
    first: list[Place] = []
    report = progress or (lambda more: None)

    def keep(layer: int, what: str, x: torch.Tensor) -> None:
        seen[layer, what] = x.cpu()
        if what == "hidden":
            report(1)

    def hold(layer: int, what: str, x: torch.Tensor) -> None:
        if what in ("attention", "mlp") and not first:
            error = float(token_errors(x.cpu(), seen[layer, what]).max())
            if not error <= tolerance:
                first.append((layer, what))
        if what == "hidden":
            report(1)

    wanted = merged_executor(executor, sources)(ids, keep)[0]
    got = executor(ids, hold)[0]
    error = overall(token_errors(got, wanted))
    return error, tolerance, first[0] if first else None
