"""Text and JSON of completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phireg.cli.output import emit, emit_generated

if TYPE_CHECKING:
    from phireg.generation import Backend
    from phireg.generation.generate import Completion, Generator, Timing
    from phireg.generation.tokenizer import Tokenizer


def stream_text(steps: Iterable[list[int | None]], tokenizer: Tokenizer) -> list[int]:
    """Print the text of a batch of one as it comes, and return its tokens."""
    tokens: list[int] = []

    def row() -> Iterator[int]:
        for (token,) in steps:
            if token is not None:
                tokens.append(token)
                yield token

    try:
        for piece in tokenizer.stream(row()):
            emit_generated(piece)
    finally:
        emit_generated("\n")
    return tokens


def emit_numbered(number: str, completion: Completion) -> None:
    """Print one of several completions below its number and prompt."""
    if completion.prompt is None:
        emit(f"{number} {len(completion.input_ids)} token ids")
    else:
        emit(f"{number} {' '.join(completion.prompt.split())}")
    text = str(list(completion.tokens)) if completion.text is None else completion.text
    emit_generated(f"{text}\n\n")


def completions_document(
    generator: Generator,
    backend: Backend,
    batches: Sequence[tuple[Sequence[Completion], Timing]],
    load_s: float,
) -> dict[str, Any]:
    """Build the document of ``--json``; docs/command-line.md describes it."""
    engines = dict.fromkeys(("tensorrt", "tensorrt-llm"), "engine_dir")
    key = (engines | {"hf": "model_dir"}).get(backend.name, "checkpoint_dir")
    return {
        **dict.fromkeys(("checkpoint_dir", "engine_dir", "model_dir")),
        key: generator.directory,
        "backend": backend.name,
        "device": backend.device,
        "dtype": backend.dtype,
        "tp_size": generator.description.tp_size,
        "processes": backend.processes,
        "sampling": generator.sampling,
        "num_beams": generator.num_beams,
        "stop_ids": generator.stop_ids,
        "load_seconds": round(load_s, 3),
        "batches": [
            {
                "prompts": len(completions),
                "new_tokens": timing.tokens,
                "prefill_ms": round(timing.prefill_s * 1000, 3),
                "tokens_per_second": timing.tokens_per_second,
            }
            for completions, timing in batches
        ],
        "results": [completion for completions, _ in batches for completion in completions],
    }
