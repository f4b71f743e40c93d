"""``phireg explain``: which rows of which source file a tensor is made of."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.options import Directory, json_option, make_plan, planning_options
from phireg.cli.output import columns, dtype_name, emit, emit_json
from phireg.cli.scales import quantized_text, scale_text
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.planning.model import Output, Plan


@click.command()
@click.argument("model_dir", type=Directory(), metavar="DIR")
@click.argument("tensor")
@planning_options
@click.option("--rank", type=int, metavar="R", help="Only this rank.  [default: all]")
@json_option
def command(model_dir: str, tensor: str, rank: int | None, as_json: bool, **options: Any) -> None:
    """Show which rows of the source files a tensor is made of.

    DIR is the model (or owner/name on the hub), TENSOR a name in the checkpoint: a tensor's, or a
    module's such as transformer.layers.0.attention.qkv. Rows and columns count from 0; a:b is a up
    to, but not including, b. With --qformat modules have scales; how they are computed is shown.
    """
    plan = make_plan(model_dir, **options)

    from phireg.planning.report import output_json

    if rank is not None and not 0 <= rank < plan.options.tp_size:
        raise UsageError(
            f"there is no rank {rank} of {plan.options.tp_size}",
            hint="ranks count from 0; --tp-size says how many there are.",
        )
    outputs = [o for o in phireg.explain(plan, tensor) if rank is None or o.rank == rank]
    if as_json:
        emit_json({"tensor": tensor, "outputs": [output_json(plan, out) for out in outputs]})
    else:
        emit("\n\n".join(_text(plan, output) for output in outputs))


def _text(plan: Plan, output: Output) -> str:
    lines = [
        f"{output.name}  {list(output.shape)} {dtype_name(output.dtype)}",
        f"in rank{output.rank}.safetensors, from",
    ]
    position = 0
    for source, group in groupby(output.origin.spans, key=lambda span: span.source):
        rows = []
        for span in group:
            target = _range(position, span.count)
            rows.append((target, "=", _range(span.start, span.count) if source else "zeros"))
            position += span.count
        lines.append("  padding" if source is None else _origin(plan, output, source))
        if source in plan.scales and plan.scales[source].size == 1:
            lines.append("    one number")
        else:
            lines.append(columns(rows, indent=4, right=[0]))
    if text := quantized_text(plan, output):
        lines.append(columns([(text,)], indent=2))
    return "\n".join(lines)


def _origin(plan: Plan, output: Output, source: str) -> str:
    from phireg.planning.model import Rows

    if isinstance(output.origin, Rows):
        tensor = plan.source.tensors[source]
        cut = ", ".join(_range(span.start, span.count) for span in output.origin.columns or ())
        kept = f", columns {cut}" if cut else ""
        kind = f"{list(tensor.shape)} {dtype_name(tensor.dtype)}{kept}"
        place = f"in {tensor.file}"
    else:
        scale = plan.scales[source]
        kind = f"[{scale.size}] {dtype_name(scale.dtype)}"
        place = f"computed {scale_text(plan, source)}"
    return "\n".join((f"  {source}  {kind}", columns([(place,)], indent=2)))


def _range(start: int, count: int) -> str:
    return f"{start}:{start + count}"
