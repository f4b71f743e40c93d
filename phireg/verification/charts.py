"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phireg.report.svg import WIDTH, LogFrame, element, picture, text
from phireg.verification.measure_types import (
    LogitsResult,
    Place,
    PromptResult,
    limit,
    place_text,
    shown,
)

_SHOWN_HEADS = 32
_SHOWN_BLOCKS = 28


def layer_chart(result: LogitsResult) -> str:
    """Every place's error given the reference's input, and the states of a run of its own."""
    layers = len(result.hidden)
    values = [error for _, error in result.places] + [*result.hidden, result.logits_tolerance]
    frame = LogFrame.around(320, [*values, result.tolerance / 10], -1.7, layers + 1.7)
    wrong = set(result.wrong_places)
    marks = []
    for place, error in result.places:
        x, y = frame.x(_where(place, layers)), frame.y(error)
        title = element("title", f"{place_text(place)}: {shown(error)}")
        kind = "end-part" if place[0] is None else place[1]
        class_ = f"dot {kind}" + (" wrong" if place in wrong else "")
        marks.append(
            element("circle", title, cx=x, cy=y, r=6 if place in wrong else 4, class_=class_)
        )
    first = result.wrong_places[:1]
    for place in first:
        x, y = frame.x(_where(place, layers)), frame.y(dict(result.places)[place])
        side = "start" if _where(place, layers) < layers / 2 else "end"
        shift = 12 if side == "start" else -12
        marks.append(
            text(x + shift, y - 8, f"first: {place_text(place)}", class_=f"callout {side}")
        )
    own = [(float(n) + 0.16, error) for n, error in enumerate(result.hidden)]
    return picture(
        frame.height,
        "relative error of every sub-module, by layer",
        frame.axes(),
        frame.limit(result.tolerance, f"tolerance {result.tolerance:.0e}"),
        *_quantized_limit(result, frame),
        frame.line(own, "own-run"),
        *(element("circle", cx=frame.x(a), cy=frame.y(b), r=2, class_="own-dot") for a, b in own),
        *marks,
        *_layer_ticks(frame, layers),
    )


def _quantized_limit(result: LogitsResult, frame: LogFrame) -> Iterator[str]:
    if result.quantized_tolerance is not None:
        tolerance = result.quantized_tolerance
        yield frame.limit(tolerance, f"tolerance of quantized parts {limit(tolerance)}")


def _where(place: Place, layers: int) -> float:
    layer, part = place
    if layer is not None:
        return layer + (-0.16 if part == "attention" else 0.16)
    return {"embedding": -1.0, "final norm": layers + 0.0, "lm_head": layers + 1.0}[part]


def _layer_ticks(frame: LogFrame, layers: int) -> Iterator[str]:
    step = max(1, layers // 16)
    for layer in range(0, layers, step):
        yield text(frame.x(layer), frame.bottom + 16, str(layer), class_="tick middle")
    for at, name in ((-1, "embed"), (layers, "norm"), (layers + 1, "head")):
        yield text(frame.x(at), frame.bottom + 16, name, class_="tick middle")
    yield text(frame.x((layers - 1) / 2), frame.bottom + 31, "layer", class_="tick middle")


def position_chart(result: LogitsResult, prompt: PromptResult) -> str:
    """Error of the logits at every position of the longest prompt."""
    points = list(enumerate(prompt.by_position))
    step = max(1, len(points) // 1200)
    worst = [
        (float(n), max(error for _, error in points[n : n + step]))
        for n in range(0, len(points), step)
    ]
    values = [error for _, error in worst] + [result.logits_tolerance]
    frame = LogFrame.around(240, values, 0, max(1, prompt.tokens - 1))
    marks = []
    for at, what in result.thresholds:
        if at < prompt.tokens:
            x = frame.x(at)
            marks.append(element("line", x1=x, x2=x, y1=14, y2=frame.bottom, class_="threshold"))
            late = at > prompt.tokens / 2
            marks.append(
                text(
                    x - 6 if late else x + 6,
                    frame.bottom - 8 - 15 * (len(marks) // 2),
                    f"past {at}: {what}",
                    class_=f"tick {'end' if late else ''} threshold-text",
                )
            )
    ticks = [
        text(frame.x(n), frame.bottom + 16, str(n), class_="tick middle")
        for n in range(0, prompt.tokens, _round_step(prompt.tokens))
    ]
    axis = text(frame.x(prompt.tokens / 2), frame.bottom + 31, "position", class_="tick middle")
    return picture(
        frame.height,
        "relative error of the logits, by position",
        frame.axes(),
        frame.limit(result.logits_tolerance, f"tolerance {limit(result.logits_tolerance)}"),
        frame.line(worst, "errors"),
        *marks,
        *ticks,
        axis,
    )


def _round_step(length: int) -> int:
    step = 1
    while length / step > 12:
        step *= 5 if str(step)[0] == "1" else 2
    return step


def attention_chart(config: Mapping[str, Any]) -> str | None:
    """Which key blocks each head's query blocks see in block-sparse layers; None without such."""
    keys = ("blocksparse_block_size", "blocksparse_num_local_blocks", "blocksparse_vertical_stride")
    heads, mapping = config.get("num_attention_heads"), config.get("mapping")
    numbers = [config.get(key) for key in keys]
    if (
        not isinstance(heads, int)
        or heads < 1
        or not all(isinstance(n, int) and n > 0 for n in numbers)
    ):
        return None
    _, local, stride = (int(n) for n in numbers if n is not None)
    step = 0 if config.get("blocksparse_homo_head_pattern") else max(1, stride // heads)
    ranks = mapping.get("tp_size", 1) if isinstance(mapping, Mapping) else 1
    blocks = min(_SHOWN_BLOCKS, local + stride + 2)
    shown = min(heads, _SHOWN_HEADS)
    columns = min(8, shown)
    gap = 14
    side = (WIDTH - gap * (columns - 1)) / columns
    pictures = []
    for head in range(shown):
        row, column = divmod(head, columns)
        x, y = column * (side + gap), row * (side + 34.0) + 18
        name = f"head {head}" + (f" · rank {head * ranks // heads}" if ranks > 1 else "")
        pictures.append(text(x, y - 6, name, class_="tick"))
        pictures.append(_pattern(x, y, side / blocks, blocks, local, stride, head * step))
    height = -(-shown // columns) * (side + 34.0)
    return picture(height, "blocks that each head attends to", *pictures)


def _pattern(
    x: float, y: float, cell: float, blocks: int, local: int, stride: int, shift: int
) -> str:
    """One head: rows are query blocks, columns key blocks. One path for each kind of cell."""
    paths: dict[str, list[str]] = {"near": [], "stripe": [], "unseen": []}
    for query in range(blocks):
        for key in range(query + 1):
            kind = "unseen"
            if query - key < local:
                kind = "near"
            elif (key + shift + 1) % stride == 0:
                kind = "stripe"
            size = cell * 0.9
            corner = f"M{x + key * cell:.1f} {y + query * cell:.1f}"
            paths[kind].append(f"{corner}h{size:.1f}v{size:.1f}h-{size:.1f}z")
    return "".join(
        element("path", d="".join(cells), class_=f"cell {kind}") for kind, cells in paths.items()
    )
