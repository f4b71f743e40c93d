"""Linears as a file stores them, and as ``quantized.linear`` takes them.

Every linear of the blueprint is made of one module or several. Where these round their inputs
alike they become one linear, with scales of rows and groups; where they do not, the parts keep
numbers: ``attention.qkv.0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phireg.errors import CheckError
from phireg.executor.levels import E2M1, Levels
from phireg.executor.quantized import inputs_name, keeps_weight, round_to_e4m3
from phireg.executor.quantized import prepare as prepare_layer
from phireg.formats import Inputs
from phireg.reader.models import Order
from phireg.reader.modules import Directory
from phireg.reader.schemes import LINEARS, SCHEMES
from phireg.reader.spec import ModelSpec
from phireg.reader.storage import Storage


@dataclass(frozen=True, slots=True)
class Stored:
    """A linear as stored: its levels (or values), what becomes of its inputs, and its bias.

    ``weight`` is a tensor of the model's dtype, or of values where a product of levels and scales
    is rounded once more.
    """

    weight: Levels | Tensor
    inputs: Inputs | None
    scale: Tensor | None  # of inputs, float32 [1]
    smoothing: Tensor | None  # that multiplies inputs, [columns]
    bias: Tensor | None

    @property
    def values(self) -> Tensor:
        """The weight in float32."""
        weight = self.weight
        return weight.values(torch.float32) if isinstance(weight, Levels) else weight.float()

    def alike(self, other: Stored) -> bool:
        """Return whether both do the same to their inputs and lie on one kind of grid."""

        def shape(stored: Stored) -> object:
            weight = stored.weight
            if isinstance(weight, Tensor):
                return None
            groups = None if weight.group_scale is None else weight.group_scale.shape[-1]
            return weight.grid, groups

        pairs = ((self.scale, other.scale), (self.smoothing, other.smoothing))
        return (
            (self.inputs, shape(self)) == (other.inputs, shape(other))
            and all((a is None) == (b is None) for a, b in pairs)
            and all(a is None or b is None or torch.equal(a, b) for a, b in pairs)
        )


def stored_linear(
    storage: Storage, parts: Mapping[str, Tensor], columns: int, bias: Tensor | None
) -> Stored:
    """Return a quantized linear of its tensors by what they are (see ``Storage.parts``)."""
    scale = parts.get("input")
    if scale is not None:
        scale = scale.float().reshape(1)
        grouped = storage.form.inputs is not None and storage.form.inputs.scale == "group"
        scale = 1 / scale if grouped and storage.reciprocal else scale
    levels = Levels(
        storage.form.weight, unpack(storage, parts["weight"], columns), *_scales(storage, parts)
    )
    weight: Levels | Tensor = levels
    if storage.form.rounds_products:
        assert levels.group_scale is not None and levels.scale is not None
        group = levels.group_scale.repeat_interleave(storage.form.group_size or 1, dim=-1)
        products = levels.levels.float() * group / levels.scale
        weight = round_to_e4m3(products) * levels.scale
    return Stored(weight, storage.form.inputs, scale, parts.get("smoothing"), bias)


def rank_layer(
    spec: ModelSpec, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a layer of one rank as ``blocks`` needs it; names are those after its prefix."""
    rest = dict(tensors)
    grouped: dict[str, Tensor] = {}
    scheme = SCHEMES.get(spec.quantization.weights or "")
    if scheme is not None and scheme.storage is not None and scheme.grouped:
        for linear in LINEARS:
            bias = tensors.get(f"{linear}.bias")
            stored = stored_in_rank(scheme.storage, linear, tensors.__getitem__, bias)
            rest = {name: x for name, x in rest.items() if name.rpartition(".")[0] != linear}
            grouped |= prepare(linear, [[stored]], False, device, dtype)
    return prepare_layer(spec.quantization, rest, device, dtype) | grouped


def stored_in_rank(
    storage: Storage, linear: str, read: Callable[[str], Tensor], bias: Tensor | None = None
) -> Stored:
    """Return a quantized linear of a rank, or a stack of experts."""
    names = storage.parts(1, 1, "").items()
    parts = {what: read(f"{linear}.{part.name}") for what, part in names}
    if storage.packing is not None:
        parts["weight"] = parts["weight"].view(torch.uint8)
    columns = parts["weight"].shape[-1] * (2 if storage.packing == "columns" else 1)
    return stored_linear(storage, parts, columns, bias)


def unpack(storage: Storage, stored: Tensor, columns: int) -> Tensor:
    """Return the levels [rows, columns] of a stored weight, in a dtype that has them."""
    if storage.packing is None:
        return stored
    if storage.packing == "rows":
        nibbles = torch.stack((stored & 15, stored >> 4), dim=1).flatten(0, 1)
        return (nibbles.to(torch.int8) ^ 8) - 8
    if storage.packing == "columns":
        codes = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
        positive = torch.tensor(E2M1)
        return torch.cat((positive, -positive)).to(torch.float8_e4m3fn)[codes.long()]
    bits = 4 if storage.form.weight == "int4" else 8
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = (stored[..., None] >> shifts) & (2**bits - 1)
    return (unsigned - 2 ** (bits - 1)).to(torch.int8).flatten(-2)[:, :columns]


def _scales(storage: Storage, parts: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale of rows and that of groups."""
    scale = parts["scale"].float()
    if storage.form.per != "group":
        return scale if parts["weight"].dim() > 2 else scale.reshape(-1), None  # experts have each
    second = parts.get("second")
    if second is None:
        return None, scale
    second = second.float().reshape(1)
    return (1 / second if storage.reciprocal else second), scale


def ordered(directory: Directory, linear: str, parts: Sequence[Stored]) -> list[Stored]:
    """Return a linear's parts with their rows in the blueprint's order."""
    order = directory.order(linear)
    if order == "plain":
        return list(parts)
    (part,) = parts
    rows = row_order(order, directory.spec)

    def taken(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) == 1 else tensor[rows]

    weight = part.weight
    if isinstance(weight, Levels):
        weight = Levels(
            weight.grid,
            weight.levels.view(torch.uint8)[rows].view(weight.levels.dtype),
            taken(weight.scale),
            taken(weight.group_scale),
        )
    else:
        weight = weight[rows]
    return [Stored(weight, part.inputs, part.scale, part.smoothing, taken(part.bias))]


def row_order(order: Order, spec: ModelSpec) -> Tensor:
    """Return for each of the blueprint's rows the module's row."""
    if order == "halves":
        inner = spec.intermediate_size
        return torch.arange(2 * inner).roll(inner)
    size, group = spec.head_size, spec.num_heads // spec.num_kv_heads
    rows = torch.arange((spec.num_heads + 2 * spec.num_kv_heads) * size)
    parts = rows.view(spec.num_kv_heads, group + 2, size).split([group, 1, 1], dim=1)
    return torch.cat([part.flatten() for part in parts])


def prepare(
    name: str,
    experts: Sequence[Sequence[Stored]],
    stacked: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return a linear's tensors as ``quantized.linear`` needs them; ``stacked`` as of experts."""
    merged = [_merged(parts) for parts in experts]
    whole = all(len(parts) == 1 for parts in merged)
    shown = merged if whole else [list(parts) for parts in experts]
    prepared: dict[str, Tensor] = {}
    for number, same in enumerate(zip(*shown, strict=True)):
        if not all(part.inputs == same[0].inputs for part in same):
            raise CheckError(f"{name}: its experts do not round their inputs alike")
        part_name = name if whole else f"{name}.{number}"
        prepared |= _part(part_name, same, stacked, device, dtype)
    biases = [part.bias for part in experts[0] if part.bias is not None]
    if biases:
        prepared[f"{name}.bias"] = torch.cat(biases).to(device, dtype)
    return prepared


def _merged(parts: Sequence[Stored]) -> list[Stored]:
    """Join parts that do the same to their inputs; otherwise return them as they are."""
    first = parts[0]
    if len(parts) == 1 or not all(first.alike(part) for part in parts[1:]):
        return list(parts)
    if isinstance(first.weight, Tensor):
        values = [part.weight for part in parts if isinstance(part.weight, Tensor)]
        weight: Levels | Tensor = torch.cat(values)
    else:
        levels = [part.weight for part in parts if isinstance(part.weight, Levels)]
        weight = _joined(levels, torch.cat)
    return [Stored(weight, first.inputs, first.scale, first.smoothing, None)]


def _joined(parts: Sequence[Levels], join: Callable[..., Tensor]) -> Levels:
    """Put weights together: their rows by ``torch.cat``, those of experts by ``torch.stack``."""
    levels = join([part.levels.view(torch.uint8) for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    groups = [part.group_scale for part in parts if part.group_scale is not None]
    by_row = any(len(scale) > 1 for scale in scales)
    if join is torch.cat and not by_row and all(torch.equal(scales[0], other) for other in scales):
        scales = scales[:1]  # of all rows
    elif join is torch.cat or by_row:
        scales = [scale.expand(len(p.levels)) for scale, p in zip(scales, parts, strict=True)]
    return Levels(
        parts[0].grid,
        levels.view(parts[0].levels.dtype),
        join(scales) if scales else None,
        join(groups) if groups else None,
    )


def _part(
    name: str, experts: Sequence[Stored], stacked: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    first = experts[0]
    prepared: dict[str, Tensor] = {}

    def put(key: str, tensors: Sequence[Tensor], kind: torch.dtype) -> None:
        whole = torch.stack(list(tensors)) if stacked else tensors[0]
        prepared[f"{name}.{key}"] = whole.to(device, kind)

    levels = [part.weight for part in experts if isinstance(part.weight, Levels)]
    if len(levels) != len(experts):
        put("weight", [part.weight for part in experts if isinstance(part.weight, Tensor)], dtype)
    elif keeps_weight(device, levels[0]):
        weight = _joined(levels, torch.stack) if stacked else levels[0]
        tensors = (weight.levels, weight.scale, weight.group_scale)
        moved = (None if tensor is None else tensor.to(device) for tensor in tensors)
        prepared |= Levels(weight.grid, *moved).packed(name)
    else:
        put("weight", [part.values(dtype) for part in levels], dtype)
    if first.smoothing is not None:
        put("smoothing", [part.smoothing for part in experts if part.smoothing is not None], dtype)
    if first.inputs is not None:
        key = inputs_name(first.inputs, smoothed=stacked or first.smoothing is not None)
        scales = [torch.empty(0) if part.scale is None else part.scale for part in experts]
        put(key, scales, torch.float32)
    return prepared
