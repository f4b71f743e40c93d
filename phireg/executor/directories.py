"""A quantized or plain Hugging Face directory as one rank of the blueprint.

Nothing but ``reader`` says which tensor is what.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from phireg.checkpoint.shards import Shards
from phireg.errors import CheckError
from phireg.executor.levels import Levels
from phireg.executor.sources import scale_defect
from phireg.executor.stored import Stored, ordered, prepare, stored_linear
from phireg.reader.modules import Directory, Module
from phireg.reader.tensors import EMBEDDING, KEY_SCALE, ROUTER, VALUE_SCALE


class DirectorySource:
    """Reads a directory's tensors by the blueprint's names; as a function, their values."""

    def __init__(self, directory: Directory, shards: Shards) -> None:
        self.directory = directory
        self.shards = shards

    def __call__(self, name: str) -> Tensor:
        """Return the values of a blueprint's tensor by its whole name."""
        for ours, theirs in self.directory.renamed():
            if name == ours:
                return self.shards.tensor(theirs)
        if name.startswith("lm_head."):
            return self._values(self._head(), name)
        index, _, rest = name.removeprefix("transformer.layers.").partition(".")
        for ours, theirs in self.directory.renamed(int(index)):
            if rest == ours:
                return self.shards.tensor(theirs)
        if rest in (KEY_SCALE, VALUE_SCALE):
            return self.cache_scales(int(index))[rest]
        linear = rest.rpartition(".")[0]
        experts = self.stored(int(index), linear)
        values = [
            torch.cat([self._values(part, name) for part in ordered(self.directory, linear, parts)])
            for parts in experts
        ]
        of_experts = self.directory.spec.experts is not None and linear.startswith("mlp.")
        return torch.stack(values) if of_experts else values[0]

    def layer(self, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a layer as ``blocks`` needs them, by names after its prefix."""
        prepared = {}
        for ours, theirs in self.directory.renamed(index):
            tensor = self.shards.tensor(theirs)
            prepared[ours] = tensor.to(device, torch.float32 if ours == ROUTER else dtype)
        for name in self.directory.row.linears:
            experts = [ordered(self.directory, name, parts) for parts in self.stored(index, name)]
            stacked = self.directory.spec.experts is not None and name.startswith("mlp.")
            prepared |= prepare(name, experts, stacked, device, dtype)
        scales = self.cache_scales(index)
        return prepared | {name: scale.to(device) for name, scale in scales.items()}

    def ends(self, device: torch.device, dtype: torch.dtype, mapped: bool) -> dict[str, Tensor]:
        """Return the tensors of no layer; ``mapped``: the embedding stays in its file."""
        prepared = {}
        for ours, theirs in self.directory.renamed():
            tensor = self.shards.tensor(theirs)
            prepared[ours] = tensor if mapped and ours == EMBEDDING else tensor.to(device, dtype)
        return prepared | prepare("lm_head", [[self._head()]], False, device, dtype)

    def stored(self, index: int, linear: str) -> list[list[Stored]]:
        """Return a linear of a layer: for every expert (or once) its modules."""
        modules = self.directory.linear(index, linear)
        return [[self.read(module) for module in expert] for expert in modules]

    def read(self, module: Module) -> Stored:
        """Return a linear of the directory, its rows in its own order."""
        tensor = self.shards.tensor
        parts = {
            what: tensor(f"{module.name}.{part.name}")
            for what, part in module.parts(self.directory.code).items()
            if f"{module.name}.{part.name}" in self.shards
        }
        bias = tensor(f"{module.name}.bias") if module.bias else None
        if module.storage is None:
            return Stored(parts["weight"], None, None, None, bias)
        return stored_linear(module.storage, parts, module.columns, bias)

    def _head(self) -> Stored:
        head = self.directory.head()
        if head is None:
            return Stored(self(EMBEDDING), None, None, None, None)
        return self.read(head)

    def cache_scales(self, index: int) -> dict[str, Tensor]:
        """Return a layer's scales of keys and values."""
        names = {"k": KEY_SCALE, "v": VALUE_SCALE}
        return {
            names[what]: self.shards.tensor(name).float().reshape(1)
            for what, name in self.directory.cache_scales(index).items()
        }

    def _values(self, stored: Stored, name: str) -> Tensor:
        part = name.rpartition(".")[2]
        if part == "bias" and stored.bias is not None:
            return stored.bias
        if part == "weight":
            return stored.values if isinstance(stored.weight, Levels) else stored.weight
        raise KeyError(name)


def open_directory(path: Path, directory: Directory) -> DirectorySource:
    """Open a directory; raise a CheckError that lists every deviation from its config.json."""
    shards = Shards(path)
    problems = [
        f"{deviation.name} {deviation.text}"
        for deviation in directory.deviations(shards.kinds())
        if not deviation.harmless
    ]
    source = DirectorySource(directory, shards)
    if not problems:
        problems += [f"{name} {text}" for name, text in content_problems(source)]
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise CheckError(
            f"{path}: the tensors are not what config.json says:\n  "
            + "\n  ".join(problems[:20] + more),
            hint="export or download the model again",
        )
    return source


def content_problems(source: DirectorySource) -> list[tuple[str, str]]:
    """Return names of scales that are none, and of what else cannot be as it is stored."""
    directory, shards = source.directory, source.shards
    problems = []
    scales = [
        n for i in range(directory.spec.num_layers) for n in directory.cache_scales(i).values()
    ]
    for module in directory.modules():
        for what, part in module.parts(directory.code).items():
            name = f"{module.name}.{part.name}"
            if what in ("scale", "second", "input", "smoothing") and name in shards:
                scales.append(name)
            elif what == "shape" and shards.tensor(name).tolist() != [module.rows, module.columns]:
                problems.append((name, f"is {shards.tensor(name).tolist()}"))
    least = torch.finfo(torch.float32).tiny
    defects = ((name, scale_defect(shards.tensor(name), least)) for name in scales)
    problems += [(name, defect) for name, defect in defects if defect]
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if (
        directory.tied
        and head in shards
        and not torch.equal(shards.tensor(table), shards.tensor(head))
    ):
        problems.append((head, "differs from the embedding, which readers take in its place"))
    return problems
