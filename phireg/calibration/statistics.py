"""Calibration statistics, and the file that keeps them.

One file serves every quantized format, dtype and number of ranks: it holds maxima of the source
model's own activations under the source's own module names, nothing of a target. AWQ's factors, if
they were searched, are those of int4 weights in groups of 128, for every format that has these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_bytes

from phireg.errors import SourceError
from phireg.files.json import parse_object
from phireg.files.regular import ANYWHERE, Limit, read_file
from phireg.files.safetensors import read_header
from phireg.files.writing import STATISTICS, write_file

FORMAT = "phireg-calibration-1"
SUFFIX = ".calib.safetensors"
_HINT = "give a file that phireg quantize wrote."
_INPUT = ".input_amax"
_AWQ = ".awq_factor"
_CACHED = re.compile(r"layers\.(0|[1-9]\d*)\.(key|value)_amax")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Absolute maxima over all calibration tokens, taken in the compute dtype; all are finite."""

    inputs: Mapping[str, NDArray[np.float32]]
    """By module name in the source ("model.layers.0.self_attn.qkv_proj"): the maximum of |x| per
    input channel of the linear, [in_features]; zeros for an expert that no token was sent to."""
    keys: tuple[float, ...]
    """By layer: the maximum of |key| after the rotary embedding; empty if not recorded."""
    values: tuple[float, ...]
    """By layer: the maximum of |value|."""
    provenance: Mapping[str, Any]
    """JSON data on their origin."""
    awq: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """By module name: the factor of each input channel that AWQ found; empty if not searched."""

    def __post_init__(self) -> None:
        for name, amax in self.inputs.items():
            _check_channels(f"the input maxima of {name}", amax)
            _check(f"the input of {name}", amax)
        for name, smoother in self.awq.items():
            _check_channels(f"AWQ's factors of {name}", smoother)
            if name not in self.inputs or smoother.shape != self.inputs[name].shape:
                raise SourceError(f"calibration statistics: no input maxima for AWQ's {name}")
            if not (np.isfinite(smoother) & (smoother > 0)).all():
                raise SourceError(
                    f"calibration statistics: AWQ's factors of {name} are not positive"
                )
        if len(self.keys) != len(self.values):
            raise SourceError(
                f"calibration statistics: keys of {len(self.keys)} layers and values of "
                f"{len(self.values)}"
            )
        for what, layers in (("keys", self.keys), ("values", self.values)):
            for layer, largest in enumerate(layers):
                _check(f"the {what} of layer {layer}", np.array([largest], dtype=np.float32))

    def of_experts(self) -> tuple[Mapping[str, NDArray[np.float32]], tuple[str, ...]]:
        """Give experts without tokens their layer's maxima; return all maxima and those experts."""
        together: dict[str, NDArray[np.float32]] = {}
        for name, amax in self.inputs.items():
            if (key := of_any_expert(name)) is not None:
                together[key] = np.maximum(together.get(key, amax), amax)
        filled = dict(self.inputs)
        for name, amax in self.inputs.items():
            others = together.get(of_any_expert(name) or "")
            if others is not None and not amax.any() and others.any():
                filled[name] = others
        return filled, tuple(name for name in filled if filled[name] is not self.inputs[name])


NO_STATISTICS = Statistics({}, (), (), {})
"""For formats whose scales need none."""


def of_any_expert(module: str) -> str | None:
    """Return a name with "*" for its expert's number; None if it is not an expert's."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    if len(numbers) < 2:
        return None
    parts[numbers[-1]] = "*"
    return ".".join(parts)


def _check_channels(what: str, values: NDArray[np.float32]) -> None:
    if values.dtype != np.float32 or values.ndim != 1 or values.size == 0:
        raise SourceError(
            f"calibration statistics: {what} are {values.dtype} {list(values.shape)}, not one "
            "float32 per channel"
        )


def _check(what: str, amax: NDArray[np.float32]) -> None:
    wrong = ~(np.isfinite(amax) & (amax >= 0))
    if wrong.any():
        channel = int(np.argmax(wrong))
        at = f" (channel {channel}, {int(wrong.sum())} in all)" if amax.size > 1 else ""
        raise SourceError(
            f"calibration statistics: {what} has the maximum {amax[channel]}{at}",
            hint="the model overflowed: calibrate in float32 or bfloat16.",
        )


def statistics_beside(output_dir: Path) -> Path:
    """The default file for the statistics of an output."""
    return output_dir.parent / f"{output_dir.name}{SUFFIX}"


def save(path: Path, statistics: Statistics) -> None:
    """Write statistics to a safetensors file, which appears complete or not at all.

    Tensors, all float32: ``<module>.input_amax`` [in_features], ``<module>.awq_factor`` of the
    same shape if AWQ's were searched, ``layers.<i>.key_amax`` [1] and ``layers.<i>.value_amax``
    [1]; the provenance is JSON in the file's metadata.
    """
    tensors = {f"{name}{_INPUT}": np.ascontiguousarray(a) for name, a in statistics.inputs.items()}
    tensors |= {f"{name}{_AWQ}": np.ascontiguousarray(a) for name, a in statistics.awq.items()}
    for layer, (key, value) in enumerate(zip(statistics.keys, statistics.values, strict=True)):
        tensors[f"layers.{layer}.key_amax"] = np.array([key], dtype=np.float32)
        tensors[f"layers.{layer}.value_amax"] = np.array([value], dtype=np.float32)
    provenance = json.dumps(dict(statistics.provenance), sort_keys=True)
    content = to_bytes(tensors, metadata={"format": FORMAT, "provenance": provenance})
    write_file(path, content, STATISTICS)


def load(path: Path) -> Statistics:
    """Read what :func:`save` wrote; a SourceError says what is wrong with a file."""
    header = read_header(path, inside=ANYWHERE, limit=Limit.STATISTICS)
    if header.metadata.get("format") != FORMAT:
        raise SourceError(
            f"{path} holds no calibration statistics of the format {FORMAT}", hint=_HINT
        )
    content = read_file(path, Limit.STATISTICS, inside=ANYWHERE)
    tensors = {}
    for name, entry in header.entries.items():
        if entry.dtype != "F32":
            raise SourceError(f"{path}: {name} is {entry.dtype}, not F32", hint=_HINT)
        data = np.frombuffer(bytearray(content[entry.start : entry.end]), np.float32)
        tensors[name] = data.reshape(entry.shape)
    try:
        provenance = parse_object(header.metadata.get("provenance", "").encode())
    except ValueError as error:
        raise SourceError(f"{path}: its provenance: {error}", hint=_HINT) from None
    try:
        return _statistics(tensors, provenance)
    except SourceError as error:
        raise SourceError(f"{path}: {error.message}", hint=error.hint) from None


def _statistics(tensors: Mapping[str, NDArray[Any]], provenance: dict[str, Any]) -> Statistics:
    inputs: dict[str, NDArray[np.float32]] = {}
    awq: dict[str, NDArray[np.float32]] = {}
    cached: dict[str, dict[int, float]] = {"key": {}, "value": {}}
    for name, tensor in tensors.items():
        if match := _CACHED.fullmatch(name):
            if tensor.shape != (1,):
                raise SourceError(f"{name} is {list(tensor.shape)}, not [1]")
            cached[match[2]][int(match[1])] = float(tensor[0])
        elif name.endswith(_INPUT):
            inputs[name.removesuffix(_INPUT)] = tensor
        elif name.endswith(_AWQ):
            awq[name.removesuffix(_AWQ)] = tensor
        else:
            raise SourceError(f"unknown tensor {name}")
    if not inputs:
        raise SourceError("no linear's input maxima")
    for kind, layers in cached.items():
        for layer in range(len(layers)):
            if layer not in layers:
                raise SourceError(f"layers.{layer}.{kind}_amax is missing")
    keys, values = (tuple(amax for _, amax in sorted(kind.items())) for kind in cached.values())
    return Statistics(dict(sorted(inputs.items())), keys, values, provenance, awq)
