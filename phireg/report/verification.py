"""The page about a verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from phireg.report.page import Axis, Facts, LogPlot, every, render_template
from phireg.verification.result import (
    CHECKS,
    ENDPOINT_CHECKS,
    ENGINE_CHECKS,
    LogitsResult,
    Place,
    Problem,
    Verification,
    error_text,
    place_text,
    tolerance_text,
)

Segment = tuple[float, float, float]
"""A tolerance from one place of the horizontal axis to another."""

_STATES = {
    "verified": ("good", "✓ verified"),
    "verified in part": ("part", "! verified in part"),
    "incomplete": ("part", "! incomplete"),
    "failed": ("bad", "✗ does not match the {}"),
}
"""A verdict's color, and its words, with a place for what is compared with."""

_COMPARED = {
    tuple(CHECKS): "source",
    tuple(ENGINE_CHECKS): "checkpoint",
    tuple(ENDPOINT_CHECKS): "model",
}
"""What a checkpoint, an engine and a server are compared with, by their checks."""

_MOST_PROBLEMS = 40
_MOST_HEADS = 32
_MOST_BLOCKS = 28
_MOST_POINTS = 1200


def render_verification(verification: Verification, facts: Facts = ()) -> str:
    """Return the page as text."""
    config, logits = verification.config, verification.logits
    mapping = config.get("mapping")
    tp_size = mapping.get("tp_size", 1) if isinstance(mapping, Mapping) else 1
    state, word = _STATES[verification.verdict]
    compared = _COMPARED[verification.known]
    facts_of_config = (
        config.get("architecture"),
        verification.family,
        f"{config.get('num_hidden_layers')} layers",
        config.get("dtype"),
        f"TP {tp_size}",
    )
    place = verification.checkpoint_dir
    return render_template(
        "verification.html",
        verification=verification,
        name=place if compared == "model" else Path(place).name,
        state=state,
        word=word.format(compared),
        facts=facts_of_config if config else (verification.family,),
        quantized=_is_quantized(config),
        leading=_leading_problem(verification),
        purposes={**CHECKS, **ENGINE_CHECKS, **ENDPOINT_CHECKS},
        compared=compared,
        most_problems=_MOST_PROBLEMS,
        layers=_layer_chart(logits) if logits else None,
        positions=_position_chart(logits) if logits else None,
        attention=_attention_chart(config, tp_size),
        provenance=(*verification.provenance, *facts),
        error_text=error_text,
        tolerance_text=tolerance_text,
    )


def _is_quantized(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization")
    return isinstance(quantization, Mapping) and any(
        quantization.get(key) for key in ("quant_algo", "kv_cache_quant_algo")
    )


def _leading_problem(verification: Verification) -> Problem | None:
    """Return a problem's cause (a key or a tensor) before what follows from it."""
    first = ("reading", "config", "weights", "structure", "logits", "ranks")
    order = (*first, *ENGINE_CHECKS, *ENDPOINT_CHECKS)
    for check in sorted(verification.checks, key=lambda check: order.index(check.name)):
        if check.problems:
            return check.problems[0]
    return None


def _layer_chart(logits: LogitsResult) -> dict[str, Any]:
    """Place every sub-module's error, and the hidden states of the executor's own run."""
    layers = len(logits.hidden)
    margin = max(1.0, layers / 16)
    ends = {"embedding": -margin, "final norm": layers - 1 + margin}
    ends["lm_head"] = layers - 1 + 2 * margin

    def center(place: Place) -> float:
        layer, part = place
        if layer is None:
            return ends[part]
        return layer + (-0.25 if part == "attention" else 0.25)

    segments = _segments(logits, [center(place) for place, _ in logits.places])
    values = [error for _, error in logits.places] + list(logits.hidden)
    values += [tolerance for *_, tolerance in segments]
    first, last = ends["embedding"] - 0.7 * margin, ends["lm_head"] + 0.7 * margin
    plot = LogPlot.around(values, first, last)
    dots = [
        {
            "x": plot.x(center(place)),
            "y": plot.y(error),
            "error": error,
            "wrong": place in logits.wrong_places,
            "kind": "end-part" if place[0] is None else place[1],
            "label": place_text(place),
        }
        for place, error in logits.places
    ]
    ticks: list[tuple[float, object]] = [(layer, layer) for layer in every(layers, 16)]
    ticks += zip(ends.values(), ("embed", "norm", "head"), strict=True)
    own = [(layer + 0.25, error) for layer, error in enumerate(logits.hidden)]
    widest = {t: (a, b) for a, b, t in sorted(segments, key=lambda s: s[1] - s[0])}
    return {
        "plot": plot,
        "dots": dots,
        "own": own,
        "ticks": ticks,
        "segments": segments,
        "tolerances": [(b, tolerance) for tolerance, (_, b) in widest.items()],
    }


def _segments(logits: LogitsResult, centers: Sequence[float]) -> list[Segment]:
    """Divide the axis half way between the parts; neighbors with one tolerance are one segment."""
    edges = [(a + b) / 2 for a, b in pairwise(centers)]
    edges = [2 * centers[0] - edges[0], *edges, 2 * centers[-1] - edges[-1]]
    segments: list[Segment] = []
    for (start, end), (place, _) in zip(pairwise(edges), logits.places, strict=True):
        tolerance = logits.tolerance_of(place)
        if segments and segments[-1][2] == tolerance:
            start = segments.pop()[0]
        segments.append((start, end, tolerance))
    return segments


def _position_chart(logits: LogitsResult) -> dict[str, Any]:
    """Place the error of the logits at every position of the longest prompt."""
    prompt = logits.prompts[-1]
    step = max(1, prompt.tokens // _MOST_POINTS)
    starts = range(0, len(prompt.by_position), step)
    worst = [(start, max(prompt.by_position[start : start + step])) for start in starts]
    last = max(1, prompt.tokens - 1)
    axis = Axis.around([0, last], 1)
    return {
        "plot": LogPlot.around([*(e for _, e in worst), logits.logits_tolerance], 0, last),
        "last": last,
        "worst": worst,
        "thresholds": [pair for pair in logits.thresholds if pair[0] < prompt.tokens],
        "ticks": [(place, text) for place, text in axis.ticks() if place <= last],
    }


def _attention_chart(config: Mapping[str, Any], tp_size: int) -> dict[str, Any] | None:
    """Draw the key blocks that heads' query blocks see, if block-sparse; like heads once."""
    keys = ("block_size", "num_local_blocks", "vertical_stride")
    numbers = [config.get("num_attention_heads"), *(config.get(f"blocksparse_{k}") for k in keys)]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    heads, _, local, stride = (int(number) for number in numbers if number is not None)
    step = 0 if config.get("blocksparse_homo_head_pattern") else max(1, stride // heads)
    blocks = min(_MOST_BLOCKS, local + stride + 2)
    pictures = []
    for head in range(min(heads, _MOST_HEADS) if step else 1):
        rank = f" · rank {head * tp_size // heads}" if tp_size > 1 else ""
        name = f"head {head}{rank}" if step else f"all {heads} heads"
        pictures.append({"name": name, "paths": _block_paths(blocks, local, stride, head * step)})
    layers, every_n = config.get("num_hidden_layers"), config.get("dense_attention_every_n_layers")
    sparse_layers = ""
    if isinstance(layers, int) and isinstance(every_n, int) and every_n > 0:
        sparse = sum((layer + 1) % every_n != 0 for layer in range(layers))
        sparse_layers = f"{sparse} of {layers} layers are block-sparse."
    return {"blocks": blocks, "heads": pictures, "sparse_layers": sparse_layers}


def _block_paths(blocks: int, local: int, stride: int, shift: int) -> dict[str, str]:
    """One head: rows are query blocks, columns key blocks; one path for each kind of cell."""
    paths: dict[str, list[str]] = {"near": [], "stripe": [], "unseen": []}
    for query in range(blocks):
        for key in range(query + 1):
            kind = "stripe" if (key + shift + 1) % stride == 0 else "unseen"
            kind = "near" if query - key < local else kind
            paths[kind].append(f"M{key} {query}h.9v.9h-.9z")
    return {kind: "".join(cells) for kind, cells in paths.items()}
