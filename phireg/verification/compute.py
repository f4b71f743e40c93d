"""The checks that run the checkpoint: logits against the reference, ranks against each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from phireg.errors import CheckError, SourceError, UsageError
from phireg.executor import Executor, ModelSpec
from phireg.executor.model import Source, free_memory, open_ranks
from phireg.planning.model import Plan
from phireg.reader.schemes import KV_CACHES, SCHEMES, WEIGHT_ONLY, Quantization
from phireg.reader.spec import parse_spec
from phireg.reference.load import Reference, open_reference
from phireg.verification.dequantized import dequantized
from phireg.verification.logits import compare_logits
from phireg.verification.measure_types import LogitsResult, limit, place_text, shown
from phireg.verification.prompts import Prompts, choose_prompts
from phireg.verification.ranks import compare_ranks
from phireg.verification.reach import Reach
from phireg.verification.recognise import place_of
from phireg.verification.request import Outcome, Progress, Request, Skipped
from phireg.verification.result import Problem

_MEMORY_SHARE = 0.8
_WITHOUT_ROUNDING = (
    "weights are dequantized here and inputs and the cache not rounded: sums in another order "
    "would turn a rounding now and then, which is no difference between the ranks"
)
_TENSOR = re.compile(r"(transformer|lm_head)[\w.]+")


class Computed:
    """One checkpoint, opened for running when a check first needs it.

    Args:
        request: what to run and how.
        config: the checkpoint's config.json.
        plan: the source's, whose family names the reference.
        progress: told how many more layers have been computed; first 0, when it begins.
    """

    def __init__(
        self, request: Request, config: Mapping[str, Any], plan: Plan, progress: Progress
    ) -> None:
        self.request = request
        self.config = dict(config)
        self.plan = plan
        self.progress = progress
        self.result: LogitsResult | None = None
        self.versions = f"torch {torch.__version__}"
        self.notes: list[str] = []
        self._opened: tuple[Executor, list[Source]] | None = None

    def logits(self) -> Outcome:
        """Compare with the reference.

        Raises:
            Skipped: there is no reference here, or no room for it.
            UsageError: there is no such device.
        """
        device = pick_device(self.request.device)
        try:
            spec = self.spec()
            reference, room = self.reference(spec, device)
            if problems := list(_sizes(spec, reference)):
                return "the source's model has other sizes", problems, []
            executor, sources = self.open(device)
            reach = Reach(spec, sources)
            prompts = self.prompts(spec)
            # Each layer is compared alone, and once more when the executor runs on its own.
            total = 2 * spec.num_layers * len(prompts.prompts)
            self.progress("logits", 0, total)
            result = compare_logits(
                executor,
                reference,
                prompts,
                lambda more: self.progress("logits", more, total),
                reach.observe,
            )
        except CheckError as error:
            return "the executor refuses the checkpoint", refusals(error), []
        except torch.OutOfMemoryError as error:
            raise Skipped(f"out of memory on {device}: use --max-tokens or --dtype") from error
        self.result = result
        longest = result.prompts[-1]
        masked = (
            [f"{result.masked} ids the source suppresses are left out"] if result.masked else []
        )
        tokens = ", ".join(str(prompt.tokens) for prompt in result.prompts)
        summary = (
            f"prompts of {tokens} tokens; relative error "
            f"{shown(max(prompt.relative for prompt in result.prompts))} "
            f"(tolerance {limit(result.logits_tolerance)}), top-1 {longest.top1:.1%}"
        )
        if result.quantized:
            kl = max(prompt.kl for prompt in result.prompts)
            summary = f"quantized ({quantized_as(spec)}); {summary}, KL {shown(kl)}"
        notes = [*prompts.notes, *reference.notes, *room, *masked, *self.notes, *reach.notes()]
        return summary, list(_problems(result)), notes

    def ranks(self) -> Outcome:
        """Compare the ranks with themselves merged.

        Raises:
            Skipped: no room.
            UsageError: there is no such device.
        """
        device = pick_device(self.request.device)
        try:
            executor, sources = self.open(device)
            quantized = executor.spec.quantization != Quantization()
            if quantized:
                plain, sources = dequantized(executor.spec, sources)
                executor = Executor(
                    plain, sources, executor.ranks, device=device, dtype=self.request.dtype
                )
            prompts = self.prompts(executor.spec).prompts
            total = 2 * executor.spec.num_layers
            self.progress("ranks", 0, total)
            error, tolerance, place = compare_ranks(
                executor,
                sources,
                prompts[-1].tokens,
                lambda more: self.progress("ranks", more, total),
            )
        except CheckError as problem:
            return "the executor refuses the checkpoint", refusals(problem), []
        except torch.OutOfMemoryError as problem:
            raise Skipped(f"out of memory on {device}: use --max-tokens") from problem
        summary = (
            f"{executor.spec.tp_size} ranks, {prompts[-1].tokens} tokens; relative error "
            f"{shown(error)} (tolerance {tolerance:.0e})"
        )
        notes = [_WITHOUT_ROUNDING] if quantized else []
        if error <= tolerance and place is None:
            return summary, [], notes
        where = "logits" if place is None else place_text(place)
        layer, part = place or (None, None)
        text = "the ranks together do not compute what they compute merged into one"
        return summary, [Problem(where, text, None, layer, part)], notes

    def spec(self) -> ModelSpec:
        """What config.json means; weights that the builder is to quantize run as they are."""
        values = dict(self.config)
        for key, kind in (("mapping", dict), ("quantization", dict), ("hidden_act", str)):
            if not isinstance(values.get(key), kind | None):
                raise CheckError(f"config.json: {key} is {values[key]!r}")
        quantization = values.get("quantization")
        algorithm = quantization.get("quant_algo") if isinstance(quantization, Mapping) else None
        if isinstance(quantization, Mapping) and algorithm in WEIGHT_ONLY.values():
            values["quantization"] = {**quantization, "quant_algo": None}
            self.notes = [f"run without {algorithm}, which TensorRT-LLM's builder applies later"]
        return parse_spec(values, str(self.request.checkpoint_dir / "config.json"))

    def open(self, device: torch.device) -> tuple[Executor, list[Source]]:
        """The executor and its ranks' tensors."""
        if self._opened is None:
            spec = self.spec()
            ranks = range(spec.tp_size)
            sources = open_ranks(self.request.checkpoint_dir, spec, ranks)
            executor = Executor(spec, sources, ranks, device=device, dtype=self.request.dtype)
            self._opened = executor, sources
        return self._opened

    def prompts(self, spec: ModelSpec) -> Prompts:
        """The lengths to run."""
        gpu = self.request.device.startswith("cuda")
        return choose_prompts(spec, self.request.max_tokens, gpu=gpu)

    def reference(self, spec: ModelSpec, device: torch.device) -> tuple[Reference, list[str]]:
        """The source's own model: in memory if it fits, else one layer at a time, with a note.

        Raises:
            Skipped: no class here reads it, or not even one layer fits.
        """
        plan = self.plan
        try:
            reference = open_reference(
                plan.chosen.family,
                plan.source,
                weights=getattr(torch, spec.dtype),
                dtype=getattr(torch, self.request.dtype),
                device=device,
                exact=frozenset(
                    span.source
                    for output in plan.outputs
                    if output.dtype == "F32"
                    for span in output.origin.spans
                    if span.source is not None
                ),
            )
        except SourceError as error:
            raise Skipped(error.message) from error
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        needed, room = reference.nbytes, f"{free / 1e9:.2g} GB of memory are free on {device}"
        if needed <= _MEMORY_SHARE * free:
            reference.keep_all()
            return reference, []
        if reference.streamed_nbytes <= _MEMORY_SHARE * free:
            reference.keep_ends()
            return reference, [
                f"the reference was read layer by layer: it needs {needed / 1e9:.2g} GB in "
                f"{self.request.dtype} and {room}"
            ]
        raise Skipped(
            f"the reference needs {reference.streamed_nbytes / 1e9:.2g} GB in "
            f"{self.request.dtype} even layer by layer and {room}: use --device cuda, --dtype "
            "or a larger machine"
        )


def quantized_as(spec: ModelSpec) -> str:
    """What is quantized, in TensorRT-LLM's names of the algorithms."""
    weights, cache = spec.quantization.weights, spec.quantization.kv_cache
    names = [SCHEMES[weights].quant_algo] if weights else []
    return ", ".join([*names, *([f"{KV_CACHES[cache]} KV cache"] if cache else [])])


def refusals(error: CheckError) -> list[Problem]:
    """The executor's complaints one by one, each with its place."""
    lines = [line.strip() for line in error.message.splitlines()]
    problems = []
    for line in lines[1:] or lines:
        match = _TENSOR.search(line)
        layer, part = place_of(match[0]) if match else (None, "config")
        where, _, text = line.partition(": ")
        problems.append(Problem(where, text or line, None, layer, part))
    return problems


def _problems(result: LogitsResult) -> Iterator[Problem]:
    errors = dict(result.places)
    for place in result.wrong_places:
        yield Problem(
            place_text(place),
            f"its output is off by {shown(errors[place])} given the reference's own input "
            f"(tolerance {limit(result.tolerance_of(place))})",
            None,
            *place,
        )
    wrong = [prompt for prompt in result.prompts if result.is_wrong(prompt)]
    if wrong:
        worst = max(wrong, key=lambda prompt: prompt.relative)
        tokens = ", ".join(str(prompt.tokens) for prompt in wrong)
        yield Problem(
            f"logits, {tokens} tokens",
            f"relative error up to {shown(worst.relative)} (tolerance "
            f"{limit(result.logits_tolerance)}), largest difference {worst.max_abs:.3g}, "
            f"KL {shown(worst.kl)}, top-1 {worst.top1:.1%}",
        )
    if not result.wrong_places:
        for layer, error in enumerate(result.hidden):
            if not error <= result.logits_tolerance:
                yield Problem(
                    f"layer {layer}",
                    f"hidden states are off by {error:.1e} although every sub-module agrees: "
                    "the residual path differs",
                    None,
                    layer,
                )
                break


def _sizes(spec: ModelSpec, reference: Reference) -> Iterator[Problem]:
    config = reference.model.config
    pairs = {
        "layers": (spec.num_layers, len(reference.model.model.layers)),
        "hidden_size": (spec.hidden_size, config.hidden_size),
        "vocab_size": (spec.vocab_size, config.vocab_size),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            text = f"{name} is {found}, the source has {wanted}"
            yield Problem("config.json", text, None, None, "config")


def pick_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", hint="use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", hint="use --device cpu.")
    return device
