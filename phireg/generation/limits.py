"""The check that a request fits a model, shared by every backend, `generate` and `summarize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from phireg.data.row import unknown_id
from phireg.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from phireg.executor import Sampling
    from phireg.generation.backend import Backend, Description, Request


def check_prompts(
    model: Description,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse empty prompts, unknown tokens, and prompts without room for ``new_tokens``."""
    if not prompts or not all(map(len, prompts)):
        raise UsageError("there is nothing to continue: a prompt has no tokens")
    room = model.positions - new_tokens
    for index, prompt in enumerate(prompts):
        name = f"{names[index]}: " if names else ""
        if token := unknown_id(prompt, model.vocab_size):
            raise UsageError(
                f"{name}token {token} is outside the model's vocabulary of {model.vocab_size}",
                hint="is this the model's own tokenizer? --tokenizer-dir names another.",
            )
        if len(prompt) > room:
            new = f" and {new_tokens} new ones" if new_tokens else ""
            # Longer texts are encoded up to there.
            count = f"{len(prompt)} tokens" + " or more" * (len(prompt) == model.positions + 1)
            raise UsageError(
                f"{name}{count}{new} exceed the model's {model.positions} positions",
                hint=f"shorten the prompt to {room} tokens, or ask for fewer new tokens."
                if room > 0
                else "ask for fewer new tokens.",
            )
        if model.max_input is not None and len(prompt) > model.max_input:
            raise UsageError(
                f"{name}{len(prompt)} tokens, and the engine was built for prompts of "
                f"{model.max_input}",
                hint=f"shorten it to {model.max_input} tokens, or build the engine with a larger "
                "--max-input-len (and no smaller -- --max_num_tokens).",
            )


def check_batch(model: Description, batch_size: int, num_beams: int, sampling: Sampling) -> None:
    """Refuse a number of rows or beams that the model cannot take, and beams with sampling."""
    if model.max_batch is not None and batch_size > model.max_batch:
        raise UsageError(
            f"{batch_size} prompts at a time, and the engine was built for {model.max_batch}",
            hint=f"use --batch-size {model.max_batch}, or build with a larger --max-batch-size.",
        )
    if num_beams < 1:
        raise UsageError(f"num_beams is {num_beams}; it must be 1 or more")
    if num_beams == 1:
        return
    if model.max_beams == 1 and model.max_batch is None:
        raise UsageError(
            f"the executor has no beam search, so {num_beams} beams are not possible",
            hint="use one beam, or --backend hf or tensorrt-llm.",
        )
    if model.max_beams is not None and num_beams > model.max_beams:
        raise UsageError(
            f"{num_beams} beams, and the engine was built for {model.max_beams}",
            hint=f"use --num-beams {model.max_beams}, or build the engine with a larger "
            "--max-beam-width.",
        )
    if not sampling.greedy:
        raise UsageError(
            "beams are searched, not drawn, so temperature, top-k and top-p have no effect",
            hint="leave them out, or use one beam.",
        )


def check_request(model: Description, request: Request) -> None:
    """Refuse a batch that the model cannot continue, as ``check_prompts`` and ``check_batch``."""
    if request.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {request.max_new_tokens}; it must be 1 or more")
    check_prompts(model, request.prompts, request.max_new_tokens)
    together = sum(map(len, request.prompts))
    if model.max_prompts is not None and together > model.max_prompts:
        raise UsageError(
            f"prompts of {together} tokens together, and a step of the engine takes "
            f"{model.max_prompts}",
            hint="use a smaller --batch-size, or build with -- --max_num_tokens.",
        )
    check_batch(model, len(request.prompts), request.num_beams, request.sampling)


def mean_nll(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    logits_of: Callable[[list[int]], Tensor],
) -> list[float]:
    """Score continuations, in nats, by the logits of every token of a text that the model takes."""
    import torch

    from phireg.executor.finite import check_logits

    means = []
    rows = [(list(p), list(c)) for p, c in zip(prompts, continuations, strict=True)]
    if not all(prompt and continuation for prompt, continuation in rows):
        raise UsageError("a prompt or its continuation has no tokens")
    check_prompts(backend.description, [prompt + new for prompt, new in rows], 0)
    for row, (prompt, continuation) in enumerate(rows):
        logits = logits_of(prompt + continuation[:-1])[len(prompt) - 1 :].float()
        check_logits(logits, row, len(prompt), backend.dtype)
        expected = torch.tensor(continuation, device=logits.device)
        means.append(float(torch.nn.functional.cross_entropy(logits, expected)))
    return means
