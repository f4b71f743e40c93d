"""Verify a Hugging Face directory, quantized or not, against the model it was made from.

Its tensors are read as the blueprint's and compared with what a conversion of the source gives, so
that every layout of a source, adapters too, can be compared with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phireg.checkpoint.rankfiles import Bits
from phireg.checkpoint.shards import SURPLUS, Shards, read_directory
from phireg.conversion.stream import assemble
from phireg.dtypes import BITS, UNIT_ROUNDOFF, as_torch
from phireg.errors import CheckError
from phireg.executor.directories import DirectorySource, content_problems
from phireg.files.json import read_json_object
from phireg.files.sizes import size
from phireg.planning.model import Plan
from phireg.planning.schedule import restrict
from phireg.reader.models import parse_model
from phireg.reader.spec import ModelSpec, parse_spec
from phireg.reader.tensors import ROUTER, Kind
from phireg.verification.comparison import Difference, compare
from phireg.verification.linears import compare_linears
from phireg.verification.mistakes import explain
from phireg.verification.result import (
    Outcome,
    Problem,
    Progress,
    Skipped,
    own_place,
    place_of,
    shown,
)
from phireg.verification.verifier import Verifier, folded

_NORMS = ("input_layernorm", "post_layernorm")
_TORCH_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class DirectoryVerifier(Verifier):
    """Makes the checks of a directory."""

    label = "directory"

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, read_json_object(path / "config.json"), progress)
        self.files = Shards(path, strict=False)
        self.refusal: CheckError | None = None
        try:
            self.directory = read_directory(path)
        except CheckError as error:
            self.refusal = error

    @functools.cached_property
    def source(self) -> DirectorySource:
        """The directory's tensors under the blueprint's names."""
        self._check_meaning()
        return DirectorySource(self.directory, self.files)

    def options(self) -> dict[str, Any]:
        """Return the options of a conversion that leaves the dtype."""
        return {"dtype": "auto" if self.refusal else self.directory.spec.dtype}

    def structure(self) -> Outcome:
        """Check names, shapes, dtypes, scales and the blocks of the two config files."""
        if (refusal := self.refusal or self.files.refusal) is not None:
            where, _, text = " ".join(refusal.message.split()).partition(": ")
            problem = Problem(where, text, refusal.hint, part="config" if self.refusal else None)
            return Outcome("the directory is damaged or has no exact meaning", [problem], [])
        deviations = list(self.directory.deviations(self.files.kinds()))
        problems = [self._problem(d.name, d.text) for d in deviations if not d.harmless]
        problems += [Problem(name, SURPLUS) for name in self.files.surplus()]
        if not problems:
            problems = [self._problem(*found) for found in content_problems(self.source)]
        notes = [f"{d.name} {d.text}" for d in deviations if d.harmless]
        layout = self.directory.layout
        number = len(self.files.files)
        count = f"{len(self.files.kinds())} tensors in {number} file{'s' * (number > 1)}"
        algorithm = f", {layout.algorithm}" if layout.algorithm else ""
        return Outcome(f"{layout.name}{algorithm}: {count}", folded(problems), notes)

    def config_json(self) -> Outcome:
        """Compare what config.json means with what the source's does."""
        self._check_meaning()
        values = read_json_object(Path(self.plan.source.directory) / "config.json")
        try:
            expected, of = parse_model(values), "the source's config.json"
        except CheckError as error:
            if not self.plan.config:
                raise Skipped(f"the source has no meaning here: {error.message}") from error
            expected, of = parse_spec(self.plan.config), "a conversion of the source"
        problems = list(_differing(self.directory.spec, expected))
        fields = len(dataclasses.fields(expected))
        return Outcome(f"{fields} settings compared with {of}", problems, [])

    def weights(self) -> Outcome:
        """Compare every tensor with the source: bit for bit, or by its grid."""
        self._check_meaning()
        if self.plan.errors:
            error = self.plan.errors[0]
            raise Skipped(f"the source has no plan: {error.subject} {error.detail}")
        deviations = self.directory.deviations(self.files.kinds())
        if self.files.refusal or any(not d.harmless for d in deviations):
            raise Skipped("the tensors are damaged, or not what config.json says")
        if other := self._other_model():
            return Outcome("no values compared: the source is another model", folded(other), [])
        quantized = set(self._quantized())
        plain = restrict(self.plan, lambda output: output.name not in quantized)
        total = sum(output.nbytes for output in self.plan.outputs)
        tensors = Blueprint(self.source)
        differences = compare(plain, tensors, lambda more: self.progress("weights", more, total))  # type: ignore[arg-type]
        norms = self._folded_norms(plain, tensors, differences)
        names = [name.removesuffix(".weight") for name in quantized]
        found = compare_linears(self.plan, self.source, norms, names)
        folded_in = norms.keys() - found.unfolded
        left = [d for d in differences if d.output.name.rpartition(".")[0] not in folded_in]
        problems = [
            dataclasses.replace(p, where=self._own_name(p.where.rpartition(" ")[2]))
            for p in explain(plain, tensors, left)  # type: ignore[arg-type]
        ]
        problems += found.problems
        notes = []
        if folded_in or found.folded:
            notes.append(
                f"factors of smoothing are folded into {len(folded_in)} norms and the rows before "
                f"{found.folded} linears, and cancel"
            )
        if found.searched:
            notes.append(
                f"{found.searched} weights are not rounded to the nearest level, evenly: clipped, "
                "or quantized by a method that corrects one value by others (GPTQ)"
            )
        summary = f"{len(plain.outputs)} tensors compared bit for bit"
        if found.compared:
            summary += f"; {found.compared} quantized linears within a step of their grid"
        return Outcome(summary, self._of_one_shard(folded(problems)), notes)

    def compute(self, check: str) -> Outcome:
        """Make a check that runs the directory."""
        if check != "ranks":
            self._check_meaning()
        if check in ("reading", "logits") and (other := folded(self._other_model())):
            return Outcome("not run: the source is another model; see weights", other[:1], [])
        return super().compute(check)

    def written(self) -> Iterator[tuple[str, str]]:
        """Yield the sizes."""
        before = sum(file.size for file in self.plan.source.files)
        after = sum(file.path.stat().st_size for file in self.files.files.values())
        yield "size", f"{size(before)} before; after: {size(after)}"

    def _check_meaning(self) -> None:
        if self.refusal is not None:
            raise Skipped(self.refusal.message)

    def _other_model(self) -> list[Problem]:
        """Return layers, names, dtypes and shapes that are not the source's: no value compares."""
        if self.plan.errors:
            return []
        spec = self.directory.spec
        name, width = spec.architecture.name, spec.hidden_size
        if other := self.other_model(architecture=name, hidden_size=width):
            return other
        expected = {o.name: f"{o.dtype} {list(o.shape)}" for o in self.plan.outputs}
        layers = 1 + max(place_of(name)[0] or 0 for name in expected)
        own, problems = spec.num_layers, []
        if own != layers:
            problems.append(Problem("layers", f"are {own}; the source has {layers}"))
        held = {
            name: f"{'F32' if name.endswith(ROUTER) else self.directory.code} {list(shape)}"
            for name, shape in self.directory.blueprint_shapes().items()
        }
        for name in dict.fromkeys([*expected, *held]):
            ours, theirs = held.get(name), expected.get(name)
            if ours == theirs or (place_of(name)[0] or 0) >= min(own, layers):
                continue
            text = f"is {ours}; the source's is {theirs}"
            if ours is None or theirs is None:
                text = "is missing" if ours is None else "is not in the source"
            problems.append(self._problem(self._own_name(name), text))
        return problems

    def _quantized(self) -> Iterator[str]:
        """Yield the blueprint's weights of which a part is quantized."""
        for layer in range(self.directory.spec.num_layers):
            for name in self.directory.row.linears:
                experts = self.directory.linear(layer, name)
                if any(m.storage is not None for modules in experts for m in modules):
                    yield f"transformer.layers.{layer}.{name}.weight"
        head = self.directory.head()
        if head is not None and head.storage is not None:
            yield "lm_head.weight"

    def _folded_norms(
        self, plan: Plan, files: Blueprint, differences: Iterable[Difference]
    ) -> dict[str, Tensor]:
        """Return the factors of norms by which the linears behind them are divided."""
        if self.directory.layout.name == "hf":
            return {}
        found = {}
        names = {d.output.name.rpartition(".")[0] for d in differences}
        with plan.source.open() as reader:
            for name in names:
                if not name.endswith(_NORMS):
                    continue
                pairs = {
                    o.name.rpartition(".")[2]: (
                        as_torch(files.read(o.name), o.dtype).float().flatten(),
                        as_torch(assemble(plan, o, reader), o.dtype).float().flatten(),
                    )
                    for o in plan.outputs
                    if o.name.rpartition(".")[0] == name
                }
                stored, expected = pairs["weight"]
                factors = torch.where(expected == 0, torch.ones(()), stored / expected)
                sound = bool((factors.isfinite() & (factors > 0)).all())
                if "bias" in pairs:
                    bias, before = pairs["bias"]
                    slack = 8 * UNIT_ROUNDOFF[self.directory.code]
                    sound = sound and torch.allclose(bias, before * factors, rtol=slack, atol=1e-6)
                if sound:
                    found[name] = factors
        return found

    def _own_name(self, name: str) -> str:
        """Return the directory's names of a tensor of the blueprint."""
        layer, _, rest = name.removeprefix("transformer.layers.").partition(".")
        index = int(layer) if name.startswith("transformer.layers.") else None
        linear, _, part = rest.rpartition(".")
        for ours, theirs in self.directory.renamed(index):
            if ours.rpartition(".")[0] == (name if index is None else rest).rpartition(".")[0]:
                return f"{theirs.rpartition('.')[0]}.{part}"
        if index is None or linear not in self.directory.row.linears:
            return name
        modules = self.directory.linear(index, linear)
        shown_modules = [m.name for m in modules[0]] if len(modules) == 1 else []
        if not shown_modules:
            inner = self.directory.row.linears[linear].modules
            experts = self.directory.row.experts.format("*")
            shown_modules = [self.directory.layer(index) + experts + module for module in inner]
        return ", ".join(f"{module}.{part}" for module in shown_modules)

    def _problem(self, name: str, text: str) -> Problem:
        return Problem(name, text, None, *own_place(name))

    def _of_one_shard(self, problems: list[Problem]) -> list[Problem]:
        """Say so where all that is wrong lies in one file of several."""
        names = [p.where.partition(", ")[0] for p in problems]
        shards = {self.files.shard(name) for name in names if name in self.files}
        held = [name in self.files for name in names]
        if len(self.files.files) < 2 or len(problems) < 2 or len(shards) > 1 or not all(held):
            return problems
        hint = f"all of it lies in {shards.pop()}: that file may be of another export"
        return [dataclasses.replace(p, hint=hint) for p in problems]


class Blueprint:
    """The unquantized tensors of a directory, as a rank file of the blueprint has them."""

    def __init__(self, source: DirectorySource) -> None:
        self._bits = functools.lru_cache(maxsize=8)(lambda name: _bits(source, name))

    def __getitem__(self, rank: int) -> Blueprint:
        return self

    def kind(self, rank: int, name: str) -> Kind:
        """Return dtype code and shape of a tensor."""
        return self._bits(name)[:2]

    def read(self, name: str, start: int = 0, count: int | None = None) -> Bits:
        """Read ``count`` elements of a tensor, or all that follow element ``start``, as bits."""
        bits: Bits = self._bits(name)[2]
        return bits[start : None if count is None else start + count]


def _bits(source: DirectorySource, name: str) -> tuple[str, tuple[int, ...], Bits]:
    tensor = source(name)
    if name.endswith(ROUTER):
        tensor = tensor.float()  # as the blueprint has it
    code = _TORCH_CODES[tensor.dtype]
    raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return code, tuple(tensor.shape), raw.view(np.dtype(BITS[code]))


def _differing(spec: ModelSpec, expected: ModelSpec) -> Iterator[Problem]:
    for entry in dataclasses.fields(expected):
        ours, theirs = getattr(spec, entry.name), getattr(expected, entry.name)
        if entry.name in ("quantization", "dtype") or ours == theirs:
            continue
        if entry.name == "architecture":
            yield _setting(entry.name, ours.name, theirs.name)
        elif entry.name == "rope":
            for part in dataclasses.fields(ours):
                a, b = getattr(ours, part.name), getattr(theirs, part.name)
                if a != b:
                    yield _setting(f"rope, {part.name}", a, b)
        else:
            yield _setting(entry.name, ours, theirs)


def _setting(name: str, ours: object, theirs: object) -> Problem:
    ours, theirs = (list(v) if isinstance(v, tuple) else v for v in (ours, theirs))
    text = f"is {shown(ours, theirs)}; the source calls for {shown(theirs, None)}"
    return Problem(f"config.json: {name}", text, part="config")
