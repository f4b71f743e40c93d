"""All checks of one checkpoint, weakest to strongest."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

from phireg.checkpoint.inspect import Inspection, inspect
from phireg.checkpoint.manifest import read_manifest
from phireg.checkpoint.rankfiles import RankFiles
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import SourceError, UsageError
from phireg.files.kinds import MANIFEST
from phireg.planning.plan import plan
from phireg.planning.report import ranges
from phireg.reader.schemes import KNOWN, KV_CACHES, SCHEMES
from phireg.reader.structure import structure_notes, structure_problems
from phireg.verification.configcheck import compare_configs
from phireg.verification.mend import with_commands
from phireg.verification.request import Outcome, Progress, Request, Skipped
from phireg.verification.result import CHECKS, ONE_RANK, QUICK, Check, Problem, Verification
from phireg.verification.scales import value_problems
from phireg.verification.weightcheck import check_weights

if TYPE_CHECKING:
    from phireg.verification.compute import Computed


def run(request: Request, progress: Progress | None = None) -> Verification:
    """Make the checks that are asked for.

    Raises:
        UsageError: an unknown check, device or dtype.
        SourceError: the checkpoint directory is none, or the source cannot be read.
        PluginError: the family cannot be found or loaded.
    """
    _validate(request)
    inspected = inspect(request.checkpoint_dir)
    runner = _Runner(request, inspected, progress or (lambda check, more, total: None))
    made = [runner.check(name) for name in CHECKS if name in request.checks]
    return Verification(
        str(request.checkpoint_dir),
        request.model_dir,
        runner.plan.chosen.family.name,
        inspected.config,
        tuple(made),
        runner.computed.result if runner.computed else None,
        tuple(_provenance(request, runner)),
    )


def _validate(request: Request) -> None:
    if unknown := sorted(set(request.checks) - set(CHECKS)):
        raise UsageError(f"unknown check {unknown[0]!r}", hint=f"known: {', '.join(CHECKS)}.")
    if request.dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"unknown dtype {request.dtype!r}", hint=f"known: {', '.join(WEIGHT_DTYPES)}."
        )
    if request.max_tokens is not None and request.max_tokens < 1:
        raise UsageError(
            f"prompts of {request.max_tokens} tokens are not possible", hint="use 1 or more."
        )
    if set(request.checks) - set(QUICK):
        from phireg.verification.compute import pick_device

        pick_device(request.device)  # not found out after reading all bytes


class _Runner:
    """What the checks share: the plan of the source, the rank files, the executor."""

    def __init__(self, request: Request, inspected: Inspection, progress: Progress) -> None:
        self.request = request
        self.found = inspected.config
        self.tp_size = len(inspected.ranks)
        self.progress = progress
        self.computed: Computed | None = None
        qformat, kv_cache_dtype = quantization_of(self.found)
        dtype = self.found.get("dtype")
        self.plan = plan(
            request.model_dir,
            family=request.family,
            revision=request.revision,
            dtype=dtype if isinstance(dtype, str) and dtype in WEIGHT_DTYPES else "auto",
            tp_size=self.tp_size,
            qformat=qformat,
            kv_cache_dtype=kv_cache_dtype,
            moe_ep_size=self._moe_ep_size(),
        )

    def _quantization(self) -> Mapping[str, Any]:
        block = self.found.get("quantization")
        return block if isinstance(block, Mapping) else {}

    def _moe_ep_size(self) -> int | None:
        """Over how many ranks the checkpoint shares its experts out, where it says so."""
        mapping = self.found.get("mapping")
        size = mapping.get("moe_ep_size") if isinstance(mapping, Mapping) else None
        possible = isinstance(size, int) and size > 1 and self.tp_size % size == 0
        return size if possible else None

    def check(self, name: str) -> Check:
        """Make one check; what stands in its way becomes its outcome."""
        started = time.monotonic()
        verdict = "passed"
        problems: list[Problem] = []
        notes: list[str] = []
        try:
            summary, problems, notes = getattr(self, name)()
            if problems:
                verdict = "failed"
        except Skipped as reason:
            verdict, summary = "skipped", str(reason)
        seconds = time.monotonic() - started
        return Check(name, verdict, summary, tuple(problems), tuple(notes), seconds)

    def structure(self) -> Outcome:
        """Names, shapes, dtypes, keys."""
        with RankFiles(self.request.checkpoint_dir, self.tp_size) as files:
            tensors = files.kinds()
            unread = [
                Problem(files.paths[rank].name, "is missing or damaged") for rank in files.errors
            ]
            values = list(value_problems(files))
        problems = [Problem(*found) for found in structure_problems(self.found, tensors)] + values
        known = {f"rank{rank}.safetensors" for rank in range(self.tp_size)}
        problems += [
            Problem(path.name, f"config.json has only {self.tp_size} ranks")
            for path in sorted(self.request.checkpoint_dir.glob("rank*.safetensors"))
            if path.name not in known
        ]
        count = sum(map(len, tensors))
        summary = f"{count} tensors in {self.tp_size} rank file{'s'[: self.tp_size > 1]}"
        harmless = _folded(Problem(*found) for found in structure_notes(self.found, tensors))
        notes = [f"{note.where}: {note.text}" for note in harmless]
        return summary, _folded(unread + problems), notes

    def config(self) -> Outcome:
        """See :mod:`phireg.verification.configcheck`."""
        plan = self.plan
        if not plan.config:
            raise Skipped(f"the source cannot be planned: {plan.errors[0].detail}")
        wanted = dict(plan.config)
        cache, alone = self._quantization().get("kv_cache_quant_algo"), []
        if cache in KV_CACHES.values() and self._quantization().get("quant_algo") is None:
            wanted["quantization"] = {**wanted["quantization"], "kv_cache_quant_algo": cache}
            alone = ["only the KV cache is quantized; phireg writes no such checkpoints"]
        problems, notes = compare_configs(self.found, wanted)
        notes += alone
        return f"{len(plan.config)} keys compared", problems, notes

    def weights(self) -> Outcome:
        """See :mod:`phireg.verification.weightcheck`."""
        plan = self.plan
        algorithm = self._quantization().get("quant_algo")
        if algorithm not in KNOWN:
            raise Skipped(f"quantized as {algorithm!r}, whose tensors phireg does not know")
        if plan.errors:
            error = plan.errors[0]
            raise Skipped(
                f"the source has no plan at TP {self.tp_size}: {error.subject} {error.detail}"
            )
        summary, problems, notes = check_weights(
            plan,
            self.request.checkpoint_dir,
            lambda more, total: self.progress("weights", more, total),
        )
        return summary, _folded(with_commands(problems, self.request)), notes

    def logits(self) -> Outcome:
        """See :mod:`phireg.verification.logits`."""
        from phireg.verification.compute import Computed

        self.computed = Computed(self.request, self.found, self.plan, self.progress)
        return self.computed.logits()

    def ranks(self) -> Outcome:
        """See :mod:`phireg.verification.ranks`."""
        if self.tp_size == 1:
            raise Skipped(ONE_RANK)
        from phireg.verification.compute import Computed

        computed = self.computed or Computed(self.request, self.found, self.plan, self.progress)
        return computed.ranks()


def quantization_of(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The qformat and the KV cache dtype to plan with, by a checkpoint's config.json.

    None is also for what phireg does not write; then the config check says that the source's plan
    has something else.
    """
    block = config.get("quantization")
    if not isinstance(block, Mapping):
        return None, None
    formats = {scheme.quant_algo: name for name, scheme in SCHEMES.items()}
    caches = {algorithm: name for name, algorithm in KV_CACHES.items()}
    algorithm, cache = (str(block.get(k)) for k in ("quant_algo", "kv_cache_quant_algo"))
    qformat = formats.get(algorithm)
    return qformat, caches.get(cache) if qformat is not None else None


def _folded(problems: Iterable[Problem]) -> list[Problem]:
    """Problems that differ in their layer or rank only become one; the first of them is kept."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        generic = re.sub(r"(?<=layers\.)\d+|(?<=^rank)\d+", "N", problem.where)
        groups.setdefault((generic, problem.text), []).append(problem)
    folded = []
    for (generic, _), alike in groups.items():
        where = alike[0].where
        if len(alike) > 1:
            for place in (r"(?<=^rank)\d+", r"(?<=layers\.)\d+"):
                numbers = [int(n[0]) for p in alike if (n := re.search(place, p.where))]
                generic = re.sub(place.replace(r"\d+", "N"), ranges(numbers), generic, count=1)
            where = generic
        folded.append(dataclasses.replace(alike[0], where=where))
    return folded


def _provenance(request: Request, runner: _Runner) -> Iterator[tuple[str, str]]:
    candidate, source = runner.plan.chosen.candidate, runner.plan.source
    yield "checkpoint", str(request.checkpoint_dir)
    yield "source", request.model_dir + (f" at {source.revision}" if source.revision else "")
    yield "family", f"{candidate.name} ({candidate.distribution} {candidate.version})"
    try:
        manifest = read_manifest(request.checkpoint_dir)
    except SourceError:
        manifest = None
    producer = manifest.get("producer") if manifest else None
    if isinstance(producer, Mapping):
        yield "made by", f"{producer.get('name')} {producer.get('version')}"
    else:
        yield "made by", f"not known: there is no {MANIFEST}"
    sizes = [file.stat().st_size for file in request.checkpoint_dir.glob("rank*.safetensors")]
    yield "rank files", f"{len(sizes)} of {sum(sizes):,} bytes together"
    yield "weights", f"{runner.found.get('dtype')}, TP {runner.tp_size}"
    yield "verified by", f"phireg {metadata.version('phireg')}"
    if runner.computed is not None:
        yield "computed", f"{request.dtype} on {request.device}, {runner.computed.versions}"
    yield "date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
