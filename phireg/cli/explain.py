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
from phireg.dtypes import E4M3_MAX
from phireg.errors import UsageError
from phireg.formats import LARGEST

if TYPE_CHECKING:
    from phireg.planning.model import Output, Plan
    from phireg.source.tensors import SourceTensor
    from phireg.targets.target import Stored


@documented(
    "phireg explain ./phi-2 lm_head",
    "phireg explain ./phi-2 transformer.layers.0.attention.qkv --tp-size 2 --rank 1",
    waits="reading the model",
)
@click.argument("names", nargs=-1, type=Directory(), metavar="DIR TENSOR")
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
        cut = ", ".join(f"{span.start}:{span.stop}" for span in output.origin.columns or ())
        kept = f", of each row groups {cut}" if cut else ""
        kind = f"[{scale.size}] {dtype_name(scale.dtype)}{kept}"
        place = f"computed {_formula(plan, source)}"
    return "\n".join((f"  {source}  {kind}", columns([(place,)], indent=2)))


def _added(tensor: SourceTensor) -> str:
    return "".join(
        f"; plus a LoRA layer of rank {delta.up.shape[delta.transposed - 1]} in {delta.up.file} at "
        f"rows {delta.row}:{delta.row + delta.count}"
        for delta in tensor.deltas
    )


def _formula(plan: Plan, name: str) -> str:
    from phireg.targets import target as names

    owner, _, companion = name.rpartition(".")
    options, form = plan.options, plan.options.format
    cached = {
        names.KV_SCALE: "key or value", names.KEY_SCALE: "key", names.VALUE_SCALE: "value"
    }  # fmt: skip
    if companion in cached:
        ends = f"{LARGEST['int8' if options.kv_cache_dtype == 'int8' else 'e4m3']:g}"
        if companion == names.KV_SCALE and options.kv_cache_dtype == "fp8":
            ends += ", but at least 1"
        what = cached[companion]
        return f"from calibration: the largest absolute {what} of the layer / {ends}"
    if companion == names.SHAPE:
        return "from the weight: its rows and columns"
    assert form is not None and options.qformat is not None
    stored = plan.target.layouts[options.qformat].scales
    linear = next((x for x in plan.linears if owner in (x.target, *x.sources)), None)
    modules = linear.groups[0] if linear else (owner,)
    smoothed = f", after division by {_smoothing(plan)}," if form.smoothing else ""
    each, others = "", ""
    if linear and linear.experts:
        each, others = f"; so for each of {linear.experts} experts", ", or of any other expert,"
    end = f"{LARGEST[form.weight]:g}"
    if companion == names.PRE_SCALE and form.smoothing == "awq":
        return (
            f"from calibration, for each input channel of {_listed(modules)}: the factor of AWQ's "
            "search, with which int4 weights change the output least"
        )
    if companion == names.PRE_SCALE:
        return (
            f"from calibration, for each input channel of {_listed(modules)}: 1 / its largest "
            "absolute value; with --alpha below 1 from the weights as well"
        )
    if companion == names.INPUT_SCALE:
        assert form.inputs is not None
        end = f"{LARGEST[form.inputs.grid]:g}"
        end = f"({end} * {E4M3_MAX:g})" if form.inputs.scale == "group" else end
        after = f", after {_smoothing(plan)}," if form.smoothing else ""
        text = f"from calibration: the largest absolute input of {_listed(modules)}{others}{after}"
        return f"{text} / {end}{_reciprocal(stored[companion])}"
    weights = _listed([f"{module}.weight" for module in modules])
    if companion == names.SECOND_SCALE:
        end = f"({end} * {E4M3_MAX:g})" if form.weight == "e2m1" else f"{E4M3_MAX:g}"
        largest = f"the largest absolute value in {weights}{smoothed}"
        return f"from the weights: {largest} / {end}{_reciprocal(stored[companion])}"
    if form.levels == 2 and form.weight == "e2m1":
        end = f"{end} / the scale of the whole weight, rounded to e4m3"
    if form.per == "tensor":
        return f"from the weights: the largest absolute value in {weights} / {end}{each}"
    of = f"{form.group_size} inputs of each row" if form.per == "group" else "row"
    return f"for each {of} of {weights}: its largest absolute value{smoothed} / {end}"


def _smoothing(plan: Plan) -> str:
    """What the target calls the factors of inputs, or what it has in norms and rows before."""
    from phireg.targets.target import PRE_SCALE

    scale = plan.target.layouts[plan.options.qformat or ""].scales.get(PRE_SCALE)
    return "factor of AWQ's" if scale is None else scale.name


def _reciprocal(scale: Stored) -> str:
    return "; its reciprocal is stored" if scale.divides else ""


def _quantized(plan: Plan, output: Output) -> str:
    """The computation of a quantized weight, in words; empty for any other tensor."""
    from phireg.targets.target import WEIGHT_SCALE

    form = plan.options.format
    target = output.name.rpartition(".")[0]
    if form is None or target not in {linear.target for linear in plan.linears}:
        return ""
    layout = plan.target.layouts[form.name]
    if output.name != f"{target}.{layout.weight_name}":
        return ""
    scale = layout.scales[WEIGHT_SCALE].name
    divided = f"divided by {scale}"
    if form.smoothing:
        of = f"{form.group_size} inputs of a row" if form.per == "group" else "row"
        divided = f"each column divided by its {_smoothing(plan)} and each {of} by its {scale}"
    packed = output.packing != (1, 1)
    rounded = f"rounded to {f'{form.weight} and packed' if packed else dtype_name(output.dtype)}"
    return f"quantized: cast to {plan.options.dtype}, {divided}, {rounded}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
