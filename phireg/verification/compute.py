"""The checks that run the checkpoint: logits against the reference, ranks against each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from phireg.errors import CheckError, SourceError
from phireg.executor import Executor, ModelSpec, read_meaning
from phireg.executor.directories import DirectorySource
from phireg.executor.model import free_memory, is_directory, open_sources
from phireg.executor.sources import Source
from phireg.planning.model import Plan
from phireg.reader.schemes import KV_CACHES, SCHEMES, WEIGHT_ONLY, Quantization
from phireg.reader.spec import parse_spec
from phireg.reference.load import Reference, open_reference
from phireg.verification.activations import ActivationRanges
from phireg.verification.logits import ReferenceNotFiniteError, compare_logits
from phireg.verification.prompts import Prompts, choose_prompts
from phireg.verification.ranks import compare_ranks, dequantized
from phireg.verification.reading import compare_reading
from phireg.verification.result import (
    LogitsResult,
    Outcome,
    Problem,
    Progress,
    Skipped,
    error_text,
    place_of,
    place_text,
    tolerance_text,
)

_MEMORY_SHARE = 0.8
_WITHOUT_ROUNDING = (
    "weights are dequantized here and inputs and the cache not rounded: sums in another order "
    "would turn a rounding now and then, which is no difference between the ranks"
)
_TENSOR = re.compile(r"(transformer|lm_head)[\w.]+")


@dataclass(eq=False)
class ComputedChecks:
    """The checks of one checkpoint that compute."""

    directory: Path
    config: Mapping[str, Any]
    device: torch.device
    dtype: str = "float32"
    max_tokens: int | None = None
    progress: Progress = lambda check, more, total: None
    result: LogitsResult | None = None  # the numbers of the logits
    _reference: Reference | None = None

    @property
    def description(self) -> str:
        """Dtype, device and version, for people."""
        return f"{self.dtype} on {self.device}, torch {torch.__version__}"

    @cached_property
    def spec(self) -> ModelSpec:
        """The meaning of config.json; weights that the builder is to quantize run as they are."""
        if is_directory(self.directory):
            return read_meaning(self.directory)
        values = dict(self.config)
        for key, kind in (("mapping", dict), ("quantization", dict), ("hidden_act", str)):
            if not isinstance(values.get(key), kind | None):
                raise CheckError(f"config.json: {key} is {values[key]!r}")
        if self._later_algorithm is not None:
            values["quantization"] = {**values["quantization"], "quant_algo": None}
        return parse_spec(values, str(self.directory / "config.json"))

    @property
    def _later_algorithm(self) -> str | None:
        """The weight-only algorithm that TensorRT-LLM's builder is to apply."""
        quantization = self.config.get("quantization")
        algorithm = quantization.get("quant_algo") if isinstance(quantization, Mapping) else None
        return algorithm if algorithm in WEIGHT_ONLY.values() else None

    @cached_property
    def opened(self) -> tuple[Executor, list[Source]]:
        """The executor and its ranks' tensors."""
        ranks = range(self.spec.tp_size)
        sources = open_sources(self.directory, self.spec, ranks)
        return Executor(self.spec, sources, ranks, device=self.device, dtype=self.dtype), sources

    @cached_property
    def prompts(self) -> Prompts:
        """The prompt lengths to run."""
        return choose_prompts(self.spec, self.max_tokens, gpu=self.device.type == "cuda")

    def run(self, check: str, plan: Plan) -> Outcome:
        """Make the check ``reading``, ``logits`` or ``ranks``."""
        try:
            if check == "reading":
                return compare_reading(self.config, self.spec, plan, self._opened_reference(plan))
            return self._logits(plan) if check == "logits" else self._ranks()
        except CheckError as error:
            return _refused(error)
        except ReferenceNotFiniteError as error:
            who = "the source" if check == "logits" else "merged"
            return error.outcome(
                f"its output in {self.dtype} ({who})",
                "verify with --dtype float32 or bfloat16, whose range is wider."
                if self.dtype == "float16"
                else "a weight may be NaN or infinite: phireg convert counts such values.",
            )
        except torch.OutOfMemoryError as error:
            advice = "use --max-input-len or --dtype"
            raise Skipped(f"out of memory on {self.device}: {advice}") from error

    def _logits(self, plan: Plan) -> Outcome:
        reference, notes = self._filled_reference(plan)
        if problems := list(_size_problems(self.spec, reference)):
            return Outcome("the source's model has other sizes", problems, [])
        executor, sources = self.opened
        ranges = ActivationRanges(executor, sources)
        (first, *_) = sources
        head = first.directory.head() if isinstance(first, DirectorySource) else None
        # Each layer is compared alone, and once more when the executor runs on its own.
        total = 2 * self.spec.num_layers * len(self.prompts.prompts)
        self.progress("logits", 0, total)
        result = self.result = compare_logits(
            executor,
            reference,
            self.prompts,
            lambda more: self.progress("logits", more, total),
            ranges.observe,
            quantized_head=head is not None and head.storage is not None,
        )
        tokens = ", ".join(str(prompt.tokens) for prompt in result.prompts)
        relative = error_text(max(prompt.relative for prompt in result.prompts))
        top1 = f"top-1 {result.prompts[-1].top1:.1%}"
        limit = tolerance_text(result.logits_tolerance)
        summary = (
            f"prompts of {tokens} tokens; relative error {relative} (tolerance {limit}), {top1}"
        )
        if result.quantized_tolerance is not None:
            parts = max(error for place, error in result.places if place[1] in result.quantized)
            kl = max(prompt.kl for prompt in result.prompts)
            summary = (
                f"quantized ({_algorithms(self.spec)}); prompts of {tokens} tokens; quantized "
                f"parts given the source's own input: relative error up to {error_text(parts)} "
                f"(limit {tolerance_text(result.quantized_tolerance)}); the model on its own: "
                f"{relative}, KL {error_text(kl)}, {top1}"
            )
        notes = [*self.prompts.notes, *notes]
        if result.masked:
            notes.append(f"{result.masked} ids the source suppresses are left out")
        if self._later_algorithm is not None:
            algorithm = self._later_algorithm
            notes.append(f"run without {algorithm}, which TensorRT-LLM's builder applies later")
        notes += ranges.notes()
        return Outcome(
            summary,
            [*_logits_problems(result), *ranges.exchanged()],
            notes,
            self.prompts.undone,
            bool(self.prompts.notes),
        )

    def _ranks(self) -> Outcome:
        executor, sources = self.opened
        quantized = self.spec.quantization != Quantization()
        if quantized:
            plain, sources = dequantized(self.spec, sources)
            executor = Executor(
                plain, sources, executor.ranks, device=self.device, dtype=self.dtype
            )
        tokens = self.prompts.prompts[-1].tokens
        total = 2 * self.spec.num_layers
        self.progress("ranks", 0, total)
        error, tolerance, place = compare_ranks(
            executor, sources, tokens, lambda more: self.progress("ranks", more, total)
        )
        summary = (
            f"{self.spec.tp_size} ranks, {tokens} tokens; relative error "
            f"{error_text(error)} (tolerance {tolerance:.0e})"
        )
        notes = [_WITHOUT_ROUNDING] if quantized else []
        if error <= tolerance and place is None:
            return Outcome(summary, [], notes)
        where = "logits" if place is None else place_text(place)
        text = "the ranks together do not compute what they compute merged into one"
        problem = Problem(where, text, None, *(place or (None, None)))
        return Outcome(summary, [problem], notes)

    def _opened_reference(self, plan: Plan) -> Reference:
        """Open the source's model, once; no weights are read."""
        if self._reference is None:
            exact = {name for o in plan.outputs if o.dtype == "F32" for name in o.sources}
            try:
                self._reference = open_reference(
                    plan.chosen.family,
                    plan.source.directory,
                    weights=getattr(torch, self.spec.dtype),
                    dtype=getattr(torch, self.dtype),
                    device=self.device,
                    exact=exact,
                    file=plan.options.readings.weights,
                    adapter=plan.options.readings.adapter,
                    tie=plan.options.readings.tie,
                    change=self._keep_window,
                )
            except SourceError as error:
                raise Skipped(error.message) from error
        return self._reference

    def _keep_window(self, values: dict[str, Any]) -> None:
        """Let the reference attend in a directory's sliding window; others have none."""
        if self.spec.sliding_window is not None:
            values["sliding_window"] = self.spec.sliding_window

    def _filled_reference(self, plan: Plan) -> tuple[Reference, list[str]]:
        """Read the source's weights, whole or layer by layer as memory allows; return notes."""
        reference = self._opened_reference(plan)
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else free_memory()
        room = f"{free / 1e9:.2g} GB of memory are free on {self.device}"
        needed, streamed = reference.nbytes, reference.streamed_nbytes
        if needed <= _MEMORY_SHARE * free:
            reference.keep_all()
            return reference, list(reference.notes)
        if streamed <= _MEMORY_SHARE * free:
            reference.keep_ends()
            return reference, [
                *reference.notes,
                f"the reference was read layer by layer: it needs {needed / 1e9:.2g} GB in "
                f"{self.dtype} and {room}",
            ]
        raise Skipped(
            f"the reference needs {streamed / 1e9:.2g} GB in {self.dtype} even layer by layer and "
            f"{room}: use --device cuda, --dtype or a larger machine"
        )


def _algorithms(spec: ModelSpec) -> str:
    """Name what is quantized, in TensorRT-LLM's names of the algorithms."""
    weights, cache = spec.quantization.weights, spec.quantization.kv_cache
    names = [SCHEMES[weights].quant_algo if weights in SCHEMES else weights] if weights else []
    return ", ".join([*names, *([f"{KV_CACHES[cache]} KV cache"] if cache else [])])


def _refused(error: CheckError) -> Outcome:
    """Make the executor's refusal an outcome; each line of it becomes a problem with its place."""
    lines = [line.strip() for line in error.message.splitlines()]
    problems: list[Problem] = []
    for line in lines[1:] or lines:
        if problems and line.startswith("- "):  # a detail of the line before
            last = problems[-1]
            problems[-1] = replace(last, text=f"{last.text} {line[2:]}")
            continue
        match = _TENSOR.search(line)
        layer, part = place_of(match[0]) if match else (None, "config")
        where, _, text = line.removeprefix("- ").partition(": ")
        problems.append(Problem(where, text or line, None, layer, part))
    return Outcome("the executor refuses the checkpoint", problems, [])


def _logits_problems(result: LogitsResult) -> Iterator[Problem]:
    errors = dict(result.places)
    for place in result.wrong_places:
        yield Problem(
            place_text(place),
            f"its output is off by {error_text(errors[place])} given the reference's own input "
            f"(tolerance {tolerance_text(result.tolerance_of(place))})",
            None,
            *place,
        )
    wrong = [prompt for prompt in result.prompts if result.is_wrong(prompt)]
    if wrong:
        worst = max(wrong, key=lambda prompt: prompt.relative)
        tokens = ", ".join(str(prompt.tokens) for prompt in wrong)
        yield Problem(
            f"logits, {tokens} tokens",
            f"relative error up to {error_text(worst.relative)} (tolerance "
            f"{tolerance_text(result.logits_tolerance)}), largest difference {worst.max_abs:.3g}, "
            f"KL {error_text(worst.kl)}, top-1 {worst.top1:.1%}",
        )
    if not result.wrong_places:
        for layer, error in enumerate(result.hidden):
            if not error <= result.logits_tolerance:
                text = f"hidden states are off by {error:.1e} although every sub-module agrees: "
                yield Problem(f"layer {layer}", f"{text}the residual path differs", None, layer)
                break


def _size_problems(spec: ModelSpec, reference: Reference) -> Iterator[Problem]:
    config = reference.model.config
    sizes = {
        "layers": (spec.num_layers, len(reference.model.model.layers)),
        "hidden_size": (spec.hidden_size, config.hidden_size),
        "vocab_size": (spec.vocab_size, config.vocab_size),
    }
    for name, (size, expected) in sizes.items():
        if size != expected:
            text = f"{name} is {size}, the source has {expected}"
            yield Problem("config.json", text, None, None, "config")
