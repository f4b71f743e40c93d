"""A LoRA adapter laid over a source: which rows of which tensors its layers are added to.

A layer belongs to the tensor of its module. Where the weights are stored otherwise (an adapter of
separate q/k/v projections over fused weights, or the reverse), the family's alternatives for one
target say which rows correspond.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from types import MappingProxyType

from phireg.findings import Finding, Severity
from phireg.layout.rules import Rules
from phireg.layout.spans import aligned
from phireg.source.adapter import Adapter, Layer
from phireg.source.model import Source
from phireg.source.tensors import Delta


def merge_adapter(source: Source, adapter: Adapter, rules: Rules) -> tuple[Source, list[Finding]]:
    """Return the source with an adapter added, and what stands against it."""
    problems = [(adapter.file.name, problem) for problem in adapter.problems]
    tensors = dict(source.tensors)
    for name, tensor in adapter.saved.items():
        tensors[name] = dataclasses.replace(tensor, name=name)
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for layer in adapter.layers:
        places = list(_places(layer, source, rules))
        if not places:
            problems.append((layer.module, "the adapter has layers for it, the weights have none"))
        for name, delta in places:
            base = source.tensors[name]
            rows, columns = base.shape if len(base.shape) == 2 else (0, 0)
            if columns != layer.shape[1] or delta.row + delta.count > rows:
                detail = f"is {list(base.shape)}, the adapter's layer {list(layer.shape)}"
                problems.append((name, detail))
            deltas[name].append(delta)
    for name, added in deltas.items():
        tensors[name] = dataclasses.replace(tensors[name], deltas=tuple(added))
    findings = [Finding(Severity.ERROR, "adapter", *problem) for problem in problems]
    if not findings:
        whole = f", {len(adapter.saved)} tensors taken whole" if adapter.saved else ""
        detail = f"{len(adapter.layers)} LoRA layers are added to the weights{whole}"
        findings.append(Finding(Severity.NOTE, "adapter", adapter.file.name, detail))
    files = (*source.files, adapter.file)
    merged = dataclasses.replace(source, tensors=MappingProxyType(tensors), files=files)
    return merged, findings


def _places(layer: Layer, source: Source, rules: Rules) -> Iterator[tuple[str, Delta]]:
    """Yield every tensor that a layer is added to, with the rows."""

    def delta(row: int, first: int, count: int) -> Delta:
        return Delta(row, first, count, layer.up, layer.down, layer.scale, layer.embedding)

    own = f"{layer.module}.weight"
    if own in source.tensors:
        height = source.tensors[own].shape[0] if source.tensors[own].shape else 0
        yield own, delta(0, 0, max(height, layer.shape[0]))
        return
    for rule in rules.values():
        for axis in rule.weight:
            if (layer.module, layer.shape[0]) in axis.sources:
                for stored in rule.weight:
                    if all(f"{name}.weight" in source.tensors for name, _ in stored.sources):
                        for ours, held in aligned(axis.spans, stored.spans):
                            if ours.source == layer.module and held.source is not None:
                                rows = delta(held.start, ours.start, ours.count)
                                yield f"{held.source}.weight", rows
                        return
