"""``phireg explain``: the rows of the source files that a tensor is made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.help import RANKS, documented
from phireg.cli.options import Directory, json_option, model_dir_option, planning_options
from phireg.cli.output import columns, counted, dtype_name, emit, emit_json
from phireg.dtypes import E4M3_MAX, INT8_MAX
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.planning.model import Output, Plan
    from phireg.source.tensors import SourceTensor

_LARGEST = {"fp8": f"{E4M3_MAX:g}", "int8": f"{INT8_MAX:g}", "int8_sq": f"{INT8_MAX:g}"}
"""The largest quantized value, by ``--qformat`` and ``--kv-cache-dtype``."""


@documented(
    "phireg explain ./phi-2 lm_head",
    "phireg explain ./phi-2 transformer.layers.0.attention.qkv --tp-size 2 --rank 1",
    waits="reading the model",
)
@click.argument("names", nargs=-1, required=True, type=Directory(), metavar="DIR TENSOR")
@model_dir_option("Another way to give DIR.")
@planning_options
@RANKS.option("--rank", type=int, metavar="R", help="Only this rank.  [default: all]")
@json_option
def command(
    names: Sequence[str], model_dir: str | None, rank: int | None, as_json: bool, **options: Any
) -> None:
    """Show which rows of the source files a tensor is made of.

    DIR is the model (or owner/name on the hub), TENSOR a name in the checkpoint: a tensor's, or a
    module's such as transformer.layers.0.attention.qkv. Rows and columns count from 0; a:b is a up
    to, but not including, b. With --qformat modules have scales; how they are computed is shown.
    """
    given = [*names] if model_dir is None else [model_dir, *names]
    if len(given) != 2:
        raise UsageError(
            f"{counted(len(given), 'name')} instead of a model and a tensor",
            hint="phireg explain DIR TENSOR",
        )
    model_dir, tensor = given
    plan = phireg.plan(model_dir, **options)

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
        f"in {plan.files[output.rank]}, from",
    ]
    position = 0
    for source, group in groupby(output.origin.spans, key=lambda span: span.source):
        rows = []
        for span in group:
            origin = f"{span.start}:{span.stop}" if source else "zeros"
            rows.append((f"{position}:{position + span.count}", "=", origin))
            position += span.count
        lines.append("  padding" if source is None else _origin(plan, output, source))
        if source in plan.scales and plan.scales[source].size == 1:
            lines.append("    one number")
        else:
            lines.append(columns(rows, indent=4, right=[0]))
    if text := _quantized(plan, output):
        lines.append(columns([(text,)], indent=2))
    return "\n".join(lines)


def _origin(plan: Plan, output: Output, source: str) -> str:
    from phireg.planning.model import Rows

    if isinstance(output.origin, Rows):
        tensor = plan.source.tensors[source]
        cut = ", ".join(f"{span.start}:{span.stop}" for span in output.origin.columns or ())
        kept = f", columns {cut}" if cut else ""
        kind = f"{list(tensor.shape)} {dtype_name(tensor.dtype)}{kept}"
        place = f"in {tensor.file}" + _added(tensor)
    else:
        scale = plan.scales[source]
        kind = f"[{scale.size}] {dtype_name(scale.dtype)}"
        place = f"computed {_formula(plan, source)}"
    return "\n".join((f"  {source}  {kind}", columns([(place,)], indent=2)))


def _added(tensor: SourceTensor) -> str:
    """The LoRA layers that are added to a tensor, in words."""
    return "".join(
        f"; plus a LoRA layer of rank {delta.up.shape[delta.transposed - 1]} in {delta.up.file} at "
        f"rows {delta.row}:{delta.row + delta.count}"
        for delta in tensor.deltas
    )


def _formula(plan: Plan, name: str) -> str:
    """The computation of a scale, in words."""
    from phireg.reader.schemes import KV_SCALE

    owner, _, companion = name.rpartition(".")
    options = plan.options
    if companion == KV_SCALE:
        ends = _LARGEST[options.kv_cache_dtype or ""]
        ends += ", but at least 1" if options.kv_cache_dtype == "fp8" else ""
        return f"from calibration: the largest absolute key or value of the layer / {ends}"
    largest = _LARGEST[options.qformat or ""]
    linear = next((x for x in plan.linears if x.target == owner), None)
    modules = linear.groups[0] if linear else (owner,)
    each, others = "", ""
    if linear and linear.experts:
        each, others = f"; so for each of {linear.experts} experts", ", or of any other expert,"
    if companion == "prequant_scaling_factor":
        return (
            f"from calibration, for each input channel of {_listed(modules)}: 1 / its largest "
            "absolute value; with --alpha below 1 from the weights as well"
        )
    if companion == "activation_scaling_factor":
        smoothed = ", after prequant_scaling_factor," if plan.smoothed else ""
        text = (
            f"from calibration: the largest absolute input of {_listed(modules)}{others}{smoothed}"
        )
        return f"{text} / {largest}"
    weights = _listed([f"{module}.weight" for module in modules])
    if plan.smoothed:
        return (
            f"for each row of {weights}: its largest absolute value, after division by "
            f"prequant_scaling_factor, / {largest}"
        )
    return f"from the weights: the largest absolute value in {weights} / {largest}{each}"


def _quantized(plan: Plan, output: Output) -> str:
    """The computation of a quantized weight, in words; empty for any other tensor."""
    target, _, companion = output.name.rpartition(".")
    if companion != "weight" or target not in {linear.target for linear in plan.linears}:
        return ""
    divided = "divided by weights_scaling_factor"
    if plan.smoothed:
        divided = (
            "each column divided by its prequant_scaling_factor and each row by its "
            "weights_scaling_factor"
        )
    rounded = f"rounded to {dtype_name(output.dtype)}"
    return f"quantized: cast to {plan.options.dtype}, {divided}, {rounded}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
