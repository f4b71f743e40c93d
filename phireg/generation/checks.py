"""What every backend refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.executor import Sampling
    from phireg.generation.backend import Description


def check_batch(
    model: Description,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    num_beams: int = 1,
) -> None:
    """Refuse a batch that the model cannot continue.

    Raises:
        UsageError: no prompt or an empty one, a token outside the vocabulary, too many tokens,
            rows or beams, or beams that are to be sampled.
    """
    if not prompts or not all(map(len, prompts)):
        raise UsageError("there is nothing to continue: a prompt has no tokens")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    check_tokens(model, (token for prompt in prompts for token in prompt))
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.positions:
        raise UsageError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{model.positions} positions",
            hint="shorten the prompt or ask for fewer new tokens",
        )
    if model.max_input is not None and longest > model.max_input:
        raise UsageError(
            f"a prompt has {longest} tokens, and the engine was built for {model.max_input}",
            hint="shorten it, or build the engine with a larger --max-input-len.",
        )
    if model.max_batch is not None and len(prompts) > model.max_batch:
        raise UsageError(
            f"{len(prompts)} prompts at a time, and the engine was built for {model.max_batch}",
            hint=f"use --batch-size {model.max_batch}, or build with a larger --max-batch-size.",
        )
    check_beams(model, num_beams, sampling)


def check_tokens(model: Description, tokens: Iterable[int]) -> None:
    """Refuse tokens outside the vocabulary.

    Raises:
        UsageError: there is one.
    """
    wrong = next((token for token in tokens if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        raise UsageError(
            f"token {wrong} is outside the model's vocabulary of {model.vocab_size}",
            hint="is this the model's own tokenizer?",
        )


def check_beams(model: Description, num_beams: int, sampling: Sampling) -> None:
    """Refuse beams that are not possible.

    Raises:
        UsageError: there are fewer than 1, more than the model allows, or they are to be sampled.
    """
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
            hint="use fewer, or build the engine with a larger --max-beam-width.",
        )
    if not sampling.greedy:
        raise UsageError(
            "beams are searched, not drawn, so temperature, top-k and top-p have no effect",
            hint="leave them out, or use one beam.",
        )


def check_continuations(
    model: Description, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[tuple[list[int], list[int]]]:
    """Pairs of a prompt and its continuation that the model can see at once.

    Raises:
        UsageError: one has no tokens, one outside the vocabulary, or too many of them.
    """
    rows = [(list(p), list(c)) for p, c in zip(prompts, continuations, strict=True)]
    for prompt, continuation in rows:
        count = len(prompt) + len(continuation)
        if not prompt or not continuation:
            raise UsageError("a prompt or its continuation has no tokens")
        limit = min(model.positions, model.max_input or model.positions)
        if count > limit:
            raise UsageError(
                f"a prompt and its continuation have {count} tokens together, and the model "
                f"takes {limit}",
                hint="shorten one of them.",
            )
        check_tokens(model, prompt + continuation)
    return rows
