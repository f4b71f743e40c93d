"""The quantized part of a plan: scales, dtypes, errors and warnings.

A scale lives on axes of its weight: permuting, fusing or sharding a module moves all of its tensors
through one table (:data:`FOLLOWS`), and no family has code for scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phireg.findings import Finding, Severity
from phireg.layout.rules import QuantRules, Rule, Rules
from phireg.layout.spans import Axis, LayoutError, Span
from phireg.planning.model import Basis, Options, Output, QuantizedLinear, Scale, ScaleTensor
from phireg.reader.schemes import KV_CACHES, KV_SCALE

FP8_ALIGNMENT = 16
"""TensorRT's FP8 matrix products want both sides of a rank's weight to be multiples of this."""


FOLLOWS: dict[str, tuple[str, ...]] = {
    "weight": ("rows", "cols"),
    "bias": ("rows",),
    "weights_scaling_factor": ("rows",),
    "prequant_scaling_factor": ("cols",),
    "activation_scaling_factor": (),
}
"""The axes of a linear's tensors, in order, by the last component of the name.

Names and shapes are those of TensorRT-LLM's quantized checkpoints (FP8, ``W8A8_SQ_PER_CHANNEL``)
and of the unquantized ones. ``weights_scaling_factor`` has one entry per output row; a per-tensor
one (shape [1]) follows nothing.
"""


def axes_of(companion: str, shape: Sequence[int] | None, rows: int) -> tuple[str, ...]:
    """The axes of a tensor of a linear: names out of ``rows`` and ``cols``, in tensor order.

    ``shape`` is that of a scale read from a checkpoint, else None; ``rows`` the number of output
    rows of its module, for a scale that was read of the source module: a target fused from single
    rows has more.
    """
    if companion not in FOLLOWS:
        raise LayoutError(f"'{companion}' is not a companion of a linear")
    if companion == "weights_scaling_factor" and shape is not None:
        per_tensor = len(shape) == 0 or (tuple(shape) == (1,) and rows > 1)
        return () if per_tensor else ("rows",)
    return FOLLOWS[companion]


class Quantization:
    """The quantized part of one plan, filled while its outputs are made.

    ``code`` is the checkpoint's dtype.
    """

    def __init__(self, options: Options, code: str) -> None:
        self.scheme = options.scheme
        self.kv_cache = options.kv_cache_dtype
        self.code = code
        self.rules = QuantRules(())
        self.linears: list[QuantizedLinear] = []
        self.scales: dict[str, ScaleTensor] = {}

    def config(self) -> dict[str, Any]:
        """The ``quantization`` block: keys that every release knows; a reader refuses others."""
        algorithm = self.scheme and self.scheme.quant_algo
        cache = KV_CACHES[self.kv_cache] if self.kv_cache else None
        block: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
        if algorithm or cache:
            block["exclude_modules"] = list(self.rules.exclude_modules)
        return block

    def weight_code(self, rule: Rule) -> str:
        """Safetensors code of a target's weight."""
        if self.scheme is None or rule.target not in self.rules.linears:
            return self.code
        return self.scheme.weight or self.code

    def targets(self) -> tuple[str, ...]:
        """The linears whose weights this run quantizes."""
        quantizes = self.scheme is not None and self.scheme.weight is not None
        return tuple(dict.fromkeys(self.rules.linears)) if quantizes else ()

    def add(self, rule: Rule, rows: Axis) -> Mapping[str, str | None]:
        """Add a linear to the quantized ones; return its scales and their dtypes by companion."""
        assert self.scheme is not None
        assert rule.cols is not None  # problems() has checked it
        sources = tuple(module for module, _ in rows.sources)
        self.linears.append(QuantizedLinear(rule.target, sources, rule.cols.length, rule.experts))
        return self.scheme.companions

    def declare(self, rule: Rule, companion: str, rows: Axis, code: str) -> tuple[str, ...]:
        """Declare a scale that the run computes, and return the axes that it follows.

        One that follows the rows is a companion of every source module; any other belongs to the
        target. Stacked experts have each a scale of their weight, and one of all their inputs.
        """
        per_tensor = companion == "weights_scaling_factor" and not (
            self.scheme and self.scheme.per_channel
        )
        follows = FOLLOWS[companion]
        if per_tensor:
            follows = ("experts",) if rule.experts else ()
        if "rows" in follows:
            sizes = dict(rows.sources)
        elif "experts" in follows:
            sizes = {rule.target: rule.experts}
        else:
            sizes = {rule.target: rule.cols.length if rule.cols and "cols" in follows else 1}
        for module, size in sizes.items():
            name = f"{module}.{companion}"
            self.scales[name] = ScaleTensor(code, size, self.computed_from(companion))
        return follows

    def computed_from(self, companion: str) -> tuple[Basis, ...]:
        """See :class:`phireg.planning.model.ScaleTensor`."""
        if companion != "weights_scaling_factor":
            return (Basis.CALIBRATION,)
        smoothed = self.scheme is not None and "prequant_scaling_factor" in self.scheme.companions
        return (Basis.CALIBRATION, Basis.WEIGHTS) if smoothed else (Basis.WEIGHTS,)

    def kv_outputs(self, tp_size: int) -> Iterator[Output]:
        """The scales of the KV caches, the same on every rank."""
        for module in self.rules.kv_caches if self.kv_cache else ():
            name = f"{module}.{KV_SCALE}"
            self.scales[name] = ScaleTensor("F32", 1, (Basis.CALIBRATION,))
            for rank in range(tp_size):
                yield Output(rank, name, "F32", (1,), 0, Scale((Span(name, 0, 1),)))

    def problems(self, rules: Rules, axes: Mapping[str, Axis]) -> Iterator[tuple[str, str, str]]:
        """Errors of the family's quantization rules (subject, detail, place).

        ``axes`` has the row map chosen for the weight of each target.
        """
        if self.kv_cache and not self.rules.kv_caches:
            yield "KV cache", "the family's quantization rules name no attention module", ""
        if self.scheme is None:
            return
        if not self.rules.linears:
            none = "the family's quantization rules name no linears for it"
            yield self.scheme.qformat, "; ".join((none, *self.rules.notes)), ""
        readers: dict[str, list[str]] = {}
        for target, axis in axes.items():
            for module, _ in axis.sources:
                readers.setdefault(module, []).append(target)
        for target in self.rules.linears:
            rule = rules.get(target)
            if rule is None:
                yield target, "the quantization rules name it, and no weight rule makes it", ""
            elif rule.cols is None:
                yield target, "has no input features, so it cannot be quantized", rule.where
            elif rule.experts and self.scheme.qformat != "fp8":
                yield target, "experts can be quantized to fp8 alone", rule.where
            elif self.scheme.weight is None:
                continue
            elif any(part.padded for part in axes[target].parts) or any(
                span.source is None for span in axes[target].spans
            ):
                yield target, "has padded rows, which have no scale", rule.where
            elif rule.experts and not _separate(rule.experts, axes[target]):
                detail = "its experts share source modules, so their scales cannot be told apart"
                yield target, detail, rule.where
            else:
                for module, _ in axes[target].sources:
                    if others := [name for name in readers[module] if name != target]:
                        detail = f"is made of {module}, which {', '.join(others)} reads as well"
                        yield target, f"{detail}: its scale would not be its own", rule.where

    def findings(self, config: Mapping[str, Any], outputs: tuple[Output, ...]) -> Iterator[Finding]:
        """Warnings and notes, which do not forbid the conversion."""
        for note in self.rules.notes if self.rules.linears else ():
            yield Finding(Severity.NOTE, "quant", str(config["architecture"]), note)
        if self.kv_cache == "fp8" and (
            config.get("position_embedding_type") == "long_rope"
            or "longrope_scaling_short_factors" in config
        ):
            detail = (
                "three bits of mantissa hold keys whose angles differ little far apart, and "
                "calibration texts are short: compare long prompts first, or use int8"
            )
            yield Finding(Severity.WARNING, "kv-cache", "FP8 on a long-rope model", detail)
        if self.scheme is None or self.scheme.quant_algo != "FP8":
            return
        for output in outputs:
            quantized = output.dtype == self.scheme.weight and output.rank == 0
            if quantized and any(size % FP8_ALIGNMENT for size in output.shape[-2:]):
                detail = (
                    f"is {list(output.shape)} on each rank; TensorRT's FP8 kernels want multiples "
                    f"of {FP8_ALIGNMENT}"
                )
                yield Finding(Severity.WARNING, "alignment", output.name, detail)


def _separate(experts: int, rows: Axis) -> bool:
    """Return whether every stacked expert has source modules of its own, and all equally many."""
    share = len(rows.parts) // experts
    owners = [
        {span.source for part in rows.parts[start : start + share] for span in part.spans}
        for start in range(0, len(rows.parts), share)
    ]
    return len(set(map(len, owners))) == 1 and sum(map(len, owners)) == len(rows.sources)
