"""The page about a verification."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phireg.report.page import WIDTH, LogPlot, Ticks, every, render_template
from phireg.verification.result import (
    CHECKS,
    LogitsResult,
    Place,
    Problem,
    Verification,
    error_text,
    place_text,
    tolerance_text,
)

_WORDS = {"failed": "does not match the source"}
_MOST_PROBLEMS = 40
_MOST_HEADS = 32
_MOST_BLOCKS = 28
_MOST_POINTS = 1200


def render_verification(verification: Verification) -> str:
    """Return the page as text."""
    config, logits = verification.config, verification.logits
    mapping = config.get("mapping")
    tp_size = mapping.get("tp_size", 1) if isinstance(mapping, Mapping) else 1
    return render_template(
        "verification.html",
        verification=verification,
        name=Path(verification.checkpoint_dir).name,
        word=_WORDS.get(verification.verdict, verification.verdict),
        facts=(
            config.get("architecture"),
            verification.family,
            f"{config.get('num_hidden_layers')} layers",
            config.get("dtype"),
            f"TP {tp_size}",
        ),
        leading=_leading_problem(verification),
        purposes=CHECKS,
        most_problems=_MOST_PROBLEMS,
        layers=_layer_chart(logits) if logits else None,
        positions=_position_chart(logits) if logits else None,
        attention=_attention_chart(config, tp_size),
        provenance=verification.provenance,
        error_text=error_text,
        tolerance_text=tolerance_text,
    )


def _leading_problem(verification: Verification) -> Problem | None:
    """Return a problem's cause (a key or a tensor) before what follows from it."""
    for name in ("reading", "config", "weights", "structure", "logits", "ranks"):
        for check in verification.checks:
            if check.name == name and check.problems:
                return check.problems[0]
    return None


def _layer_chart(logits: LogitsResult) -> dict[str, Any]:
    """Place every sub-module's error, and the hidden states of the executor's own run."""
    layers = len(logits.hidden)
    margin = max(1.0, layers / 16)
    ends = {"embedding": -margin, "final norm": layers - 1 + margin}
    ends["lm_head"] = layers - 1 + 2 * margin
    values = [error for _, error in logits.places] + [*logits.hidden, logits.logits_tolerance]
    plot = LogPlot.around(
        320,
        [*values, logits.tolerance / 10],
        ends["embedding"] - 0.7 * margin,
        ends["lm_head"] + 0.7 * margin,
    )

    def place_x(place: Place) -> float:
        layer, part = place
        if layer is None:
            return plot.x(ends[part])
        return plot.x(layer + (-0.16 if part == "attention" else 0.16))

    dots = [
        {
            "x": place_x(place),
            "y": plot.y(error),
            "error": error,
            "wrong": place in logits.wrong_places,
            "kind": "end-part" if place[0] is None else place[1],
            "label": place_text(place),
        }
        for place, error in logits.places
    ]
    ticks: Ticks = [(layer, layer) for layer in every(layers, 16)]
    ticks += zip(ends.values(), ("embed", "norm", "head"), strict=True)
    own = [(layer + 0.16, error) for layer, error in enumerate(logits.hidden)]
    return {"plot": plot, "dots": dots, "own": own, "ticks": ticks}


def _position_chart(logits: LogitsResult) -> dict[str, Any]:
    """Place the error of the logits at every position of the longest prompt."""
    prompt = logits.prompts[-1]
    step = max(1, prompt.tokens // _MOST_POINTS)
    starts = range(0, len(prompt.by_position), step)
    worst = [(start, max(prompt.by_position[start : start + step])) for start in starts]
    values = [error for _, error in worst] + [logits.logits_tolerance]
    return {
        "plot": LogPlot.around(240, values, 0, max(1, prompt.tokens - 1)),
        "worst": worst,
        "thresholds": [pair for pair in logits.thresholds if pair[0] < prompt.tokens],
        "ticks": [(n, n) for n in range(0, prompt.tokens, _round_step(prompt.tokens))],
    }


def _round_step(length: int) -> int:
    step = 1
    while length / step > 12:
        step *= 5 if str(step)[0] == "1" else 2
    return step


def _attention_chart(config: Mapping[str, Any], tp_size: int) -> dict[str, Any] | None:
    """Draw the key blocks that each head's query blocks see; None without block-sparse layers."""
    keys = ("block_size", "num_local_blocks", "vertical_stride")
    numbers = [config.get("num_attention_heads"), *(config.get(f"blocksparse_{k}") for k in keys)]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    heads, _, local, stride = (int(number) for number in numbers if number is not None)
    step = 0 if config.get("blocksparse_homo_head_pattern") else max(1, stride // heads)
    blocks = min(_MOST_BLOCKS, local + stride + 2)
    count = min(heads, _MOST_HEADS)
    columns, gap = min(8, count), 14
    side = (WIDTH - gap * (columns - 1)) / columns
    pictures = []
    for head in range(count):
        row, column = divmod(head, columns)
        x, y = column * (side + gap), row * (side + 34) + 18
        rank = f" · rank {head * tp_size // heads}" if tp_size > 1 else ""
        paths = _block_paths(x, y, side / blocks, blocks, local, stride, head * step)
        pictures.append({"x": x, "y": y, "name": f"head {head}{rank}", "paths": paths})
    layers, every_n = config.get("num_hidden_layers"), config.get("dense_attention_every_n_layers")
    sparse_layers = ""
    if isinstance(layers, int) and isinstance(every_n, int) and every_n > 0:
        sparse = sum((layer + 1) % every_n != 0 for layer in range(layers))
        sparse_layers = f"{sparse} of {layers} layers are block-sparse."
    height = -(-count // columns) * (side + 34)
    return {"height": height, "heads": pictures, "sparse_layers": sparse_layers}


def _block_paths(
    x: float, y: float, cell: float, blocks: int, local: int, stride: int, shift: int
) -> dict[str, str]:
    """One head: rows are query blocks, columns key blocks; one path for each kind of cell."""
    paths: dict[str, list[str]] = {"near": [], "stripe": [], "unseen": []}
    size = cell * 0.9
    for query in range(blocks):
        for key in range(query + 1):
            kind = "stripe" if (key + shift + 1) % stride == 0 else "unseen"
            kind = "near" if query - key < local else kind
            corner = f"M{x + key * cell:.1f} {y + query * cell:.1f}"
            paths[kind].append(f"{corner}h{size:.1f}v{size:.1f}h-{size:.1f}z")
    return {kind: "".join(cells) for kind, cells in paths.items()}
