"""Text generation from token ids: batches, stop ids, streaming."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from phireg.errors import UsageError
from phireg.executor.attention import has_kernels
from phireg.executor.decoder import Decoder, Sampling
from phireg.executor.finite import NO_TOKEN, NotFiniteError, dtype_name
from phireg.executor.model import Executor

_GREEDY = Sampling()
# Caches have a multiple of so many slots, so that calls of about the same size share one.
_SLOTS = 64


def generate(
    model: Executor,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = _GREEDY,
) -> list[list[int]]:
    """Continue every prompt of a batch.

    Args:
        model: a loaded checkpoint.
        prompts: token ids of each row, at least one; the rows may differ in length.
        max_new_tokens: new tokens per row at most.
        stop_ids: a row ends with the first of these it produces.
        sampling: how tokens are chosen.

    Returns:
        The new tokens of each row, a stop id included.

    Raises:
        UsageError: see ``stream``.
    """
    return rows_of(stream(model, prompts, max_new_tokens, stop_ids, sampling), len(prompts))


def rows_of(
    steps: Iterable[list[int | None]], count: int, without: Collection[int] = ()
) -> list[list[int]]:
    """Return the tokens of ``count`` rows of a stream, ``without`` some of them."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None and token not in without:
                row.append(token)
    return rows


def stream(
    model: Executor,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = _GREEDY,
) -> Iterator[list[int | None]]:
    """Continue every prompt of a batch, step by step; arguments as of ``generate``.

    Yields:
        Each row's next token, or None where the row has ended.

    Raises:
        UsageError: no prompt, an empty one, a token outside the vocabulary, or more tokens than
            the model has positions.
        NotFiniteError: the logits of a row are not finite.
    """
    _check(model, prompts, max_new_tokens)
    # The decoder leaves the model while it is in use: another stream gets its own.
    decoder, model.decoder = _fitting(model, prompts, max_new_tokens, sampling), None
    try:
        decoder.prefill(prompts, sampling.seed)
        lengths = list(map(len, prompts))
        yield from tokens_of(decoder, lengths, max_new_tokens, frozenset(stop_ids))
    finally:
        model.decoder = decoder


class Steps(Protocol):
    """A batch in generation: ``token`` has each row's newest one, and ``step`` makes the next."""

    batch: int
    token: Tensor  # int64 [batch]; NO_TOKEN where the logits are not finite
    dtype: torch.dtype  # of the computation

    def step(self) -> None:
        """Choose the next tokens, without waiting for a GPU."""


def tokens_of(
    decoder: Steps, lengths: Sequence[int], max_new_tokens: int, stops: frozenset[int]
) -> Iterator[list[int | None]]:
    """Yield each row's tokens until all have ended; the first one is chosen already."""
    ended = [False] * decoder.batch
    on_gpu = decoder.token.is_cuda
    host = torch.empty(decoder.batch, dtype=torch.int64, pin_memory=on_gpu)
    for left in range(max_new_tokens - 1, -1, -1):
        host.copy_(decoder.token, non_blocking=True)
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(decoder.token.device))
            if left:
                decoder.step()  # the GPU goes on while the host looks at this token
            copied.synchronize()
        tokens = host.tolist()
        for row, (token, end) in enumerate(zip(tokens, ended, strict=True)):
            if token == NO_TOKEN and not end:
                position = lengths[row] + max_new_tokens - 1 - left
                raise NotFiniteError(row, position, dtype_name(decoder.dtype))
        yield [None if end else token for token, end in zip(tokens, ended, strict=True)]
        ended = [end or token in stops for token, end in zip(tokens, ended, strict=True)]
        if all(ended):
            return
        if left and not on_gpu:
            decoder.step()


def _check(model: Executor, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what would index out of range; phireg.generation.limits tells users which prompt."""
    vocab_size, positions = model.spec.vocab_size, model.spec.max_position_embeddings
    for prompt in prompts or [()]:
        in_vocabulary = all(0 <= token < vocab_size for token in prompt)
        if not (prompt and in_vocabulary and 0 < max_new_tokens <= positions - len(prompt)):
            raise UsageError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones: the model takes "
                f"token ids below {vocab_size} and 2 to {positions} tokens in all"
            )


def _fitting(
    model: Executor, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
) -> Decoder:
    """Return the last call's decoder, with its captured step, when it serves this one too."""
    need = max(map(len, prompts)) + max_new_tokens
    batch, slots = len(prompts), -(-need // _SLOTS) * _SLOTS
    sampling = replace(sampling, seed=0)  # given with the prompts
    kept: Decoder | None = model.decoder
    if kept is not None and kept.serves(batch, slots, sampling):
        return kept
    model.decoder = kept = None  # its memory is needed
    fused = has_kernels(model.device) and model.fusable
    return Decoder(model, batch, slots, sampling, fused=fused)
