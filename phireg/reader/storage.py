"""How a quantized linear is stored: the tensors of each layout, their dtypes and shapes.

Facts are from the packages that write them (nvidia-modelopt 0.47, compressed-tensors 0.20).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from phireg.formats import Format, Grid

LayoutName: TypeAlias = Literal["hf", "hf-modelopt", "hf-compressed-tensors", "trtllm"]
Packing: TypeAlias = Literal["rows", "columns", "words"]
"""Two rows of int4 in a byte, the even one in its lower half; two columns of e2m1, likewise; or
columns of int4 or int8 plus half their range in 32-bit words, the first in the lowest bits."""

_CODES: Mapping[Grid, str] = {"e4m3": "F8_E4M3", "int8": "I8", "int4": "U8", "e2m1": "U8"}
ANY_FLOAT = ""
"""The code of a scale that may be in any dtype of unquantized weights."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a quantized linear: its name after the module's, dtype code and shape."""

    name: str
    code: str
    shape: tuple[int, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Storage:
    """How a quantized linear is stored; ``reciprocal`` scales of a second level divide."""

    layout: LayoutName
    form: Format
    packing: Packing | None = None
    reciprocal: bool = False

    def parts(self, rows: int, columns: int, code: str) -> dict[str, Part]:
        """Return the tensors by what they are; ``code`` is the model's dtype."""
        return _PARTS[self.layout](self, rows, columns, code)

    def problem(self, rows: int, columns: int) -> str | None:
        """Return why a linear of that size cannot be stored so."""
        if self.packing == "rows" and rows % 2:
            return f"{rows} rows do not make pairs"
        size = self.form.group_size
        if size is not None and columns % size:
            return f"{columns} inputs are not groups of {size}"
        return "odd inputs make no pairs" if self.packing == "columns" and columns % 2 else None


def _modelopt_parts(storage: Storage, rows: int, columns: int, code: str) -> dict[str, Part]:
    form = storage.form
    grouped = (rows, columns // (form.group_size or columns))
    shape = {"tensor": (), "channel": (rows,), "group": grouped}[form.per]
    packed = (rows // 2, columns) if storage.packing == "rows" else (rows, columns // 2)
    parts = {
        "weight": Part(
            "weight", _CODES[form.weight], packed if storage.packing else (rows, columns)
        ),
        "scale": Part("weight_scale", "F8_E4M3" if form.weight == "e2m1" else "F32", shape),
    }
    if form.levels == 2:
        parts["second"] = Part("weight_scale_2", "F32", ())
    if form.inputs is not None and form.inputs.scale != "token":
        parts["input"] = Part("input_scale", "F32", ())
    if form.smoothing is not None:
        # AWQ's may be folded into the norm before.
        required = form.smoothing == "smoothquant"
        parts["smoothing"] = Part("pre_quant_scale", code, (columns,), required)
    return parts


# TensorRT-LLM's checkpoints, as ModelOpt 0.47 writes them

_RANK_NAMES = {
    "scale": "weights_scaling_factor",
    "second": "weights_scaling_factor_2",
    "input": "activation_scaling_factor",
    "smoothing": "prequant_scaling_factor",
}


def _rank_parts(storage: Storage, rows: int, columns: int, code: str) -> dict[str, Part]:
    """ModelOpt's parts under other names; pairs of int4 are int8, and numbers have an axis."""
    parts = _modelopt_parts(storage, rows, columns, code)
    for what, name in _RANK_NAMES.items():
        if what in parts:
            # Those of NVFP4 have none.
            shape = parts[what].shape or (() if storage.form.weight == "e2m1" else (1,))
            parts[what] = replace(parts[what], name=name, required=True, shape=shape)
    if storage.form.weight == "int4":
        parts["weight"] = replace(parts["weight"], code="I8")
    return parts


def _compressed_parts(storage: Storage, rows: int, columns: int, code: str) -> dict[str, Part]:
    form, packing = storage.form, storage.packing
    groups = columns // (form.group_size or columns)
    shape = {"tensor": (1,), "channel": (rows, 1), "group": (rows, groups)}[form.per]
    if packing == "words":
        per_word = 8 if form.weight == "int4" else 4
        parts = {
            "weight": Part("weight_packed", "I32", (rows, -(-columns // per_word))),
            "shape": Part("weight_shape", "I64", (2,)),
        }
    elif packing == "columns":
        parts = {"weight": Part("weight_packed", "U8", (rows, columns // 2))}
    else:
        parts = {"weight": Part("weight", _CODES[form.weight], (rows, columns))}
    second = form.levels == 2
    parts["scale"] = Part("weight_scale", "F8_E4M3" if second else ANY_FLOAT, shape)
    if second:
        parts["second"] = Part("weight_global_scale", "F32", (1,))
    if form.inputs is not None and form.inputs.scale != "token":
        grouped = form.inputs.scale == "group"
        parts["input"] = (
            Part("input_global_scale", "F32", (1,))
            if grouped
            else Part("input_scale", ANY_FLOAT, (1,))
        )
    return parts


_PARTS: Mapping[str, Callable[[Storage, int, int, str], dict[str, Part]]] = {
    "hf-modelopt": _modelopt_parts,
    "hf-compressed-tensors": _compressed_parts,
    "trtllm": _rank_parts,
}
