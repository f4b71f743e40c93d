"""Which tensors live on which axes of a linear.

A scale is not another tensor: it is an axis of its weight. Permuting, fusing or sharding a module
moves all of its companions through this one table, and no family writes scale-specific code.
Names and shapes are those of TensorRT-LLM's quantized checkpoints (FP8, ``W8A8_SQ_PER_CHANNEL``)
and of the unquantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from phireg.layout.spans import LayoutError

FOLLOWS: dict[str, tuple[str, ...]] = {
    "weight": ("rows", "cols"),
    "bias": ("rows",),
    "weights_scaling_factor": ("rows",),
    "prequant_scaling_factor": ("cols",),
    "activation_scaling_factor": (),
}
"""Companion name to the weight axes it has, in order.

``weights_scaling_factor`` has one entry per output row; a per-tensor one (shape [1]) follows
nothing (:func:`axes_of` tells them apart by shape, a weight having more than one row).
"""


def axes_of(companion: str, shape: Sequence[int] | None, rows: int) -> tuple[str, ...]:
    """The axes ``companion`` lives on: names out of ``rows`` and ``cols``, in tensor order.

    Args:
        companion: last component of the tensor name.
        shape: its shape where one exists already (a scale read from a checkpoint), else None.
        rows: number of output rows of the module whose companion it is. For a scale that was read
            this is the source module; a target fused from single rows has more.

    Raises:
        LayoutError: the companion is not in the table.
    """
    try:
        follows = FOLLOWS[companion]
    except KeyError:
        raise LayoutError(f"'{companion}' is not a companion of a linear") from None
    if companion == "weights_scaling_factor" and shape is not None:
        per_tensor = len(shape) == 0 or (tuple(shape) == (1,) and rows > 1)
        return () if per_tensor else follows
    return follows
