"""Verify a checkpoint against its source: all checks, weakest to strongest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.checkpoint.inspect import checkpoint_config
from phireg.checkpoint.rankfiles import RankFiles, world_size
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import UsageError, check_known
from phireg.files.kinds import HF_MODEL, kind_of
from phireg.files.sizes import size
from phireg.planning.model import Output, Plan, QuantizedLinear, Scale
from phireg.planning.report import ranges
from phireg.planning.schedule import restrict
from phireg.reader.schemes import CACHE_DTYPES, KNOWN, QFORMATS
from phireg.reader.structure import structure_findings
from phireg.registry import AUTO
from phireg.source.readings import Readings
from phireg.verification.comparison import compare, is_comparable
from phireg.verification.config import compare_configs
from phireg.verification.mistakes import explain, explain_quantized, regroup_hint
from phireg.verification.quantized import (
    LinearComparison,
    activation_problems,
    cache_problems,
    compare_quantized,
    rank_problems,
    scale_defects,
)
from phireg.verification.result import (
    CHECKS,
    QUICK,
    Outcome,
    Problem,
    Progress,
    Skipped,
    Verification,
    make_check,
    place_of,
)
from phireg.verification.verifier import Verifier, folded

if TYPE_CHECKING:
    from phireg.verification.directories import DirectoryVerifier


def verify(
    checkpoint_dir: str | Path,
    model_dir: str | Path,
    *,
    family: str = AUTO,
    revision: str | None = None,
    checks: Collection[str] = tuple(CHECKS),
    device: str = "auto",
    dtype: str = "float32",
    max_tokens: int | None = None,
    weights: str | None = None,
    adapter: str | None = None,
    tie: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a checkpoint with the model it was made from; see docs/verify.md.

    Args:
        checkpoint_dir: the checkpoint, or a Hugging Face directory, whatever tool wrote it.
        model_dir: the source: a directory, or a repository on the Hugging Face hub.
        family: as for :func:`phireg.plan`.
        revision: branch, tag or commit of a hub repository.
        checks: names out of ``phireg.verification.result.CHECKS``.
        device: where logits are computed: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: in which dtype; float32 compares sharpest.
        max_tokens: most tokens of a prompt; None for what a stated budget allows.
        weights: as for :func:`phireg.plan`, like ``adapter`` and ``tie``; by default what the
            checkpoint's manifest says it was converted with.
        adapter: see ``weights``.
        tie: see ``weights``.
        progress: takes (check, how much more is done, the total), perhaps from worker threads:
            bytes of ``weights``, layers of ``logits`` and ``ranks``.

    Raises:
        UsageError: an unknown check, device or dtype.
        SourceError: the directory is not a checkpoint, or the source cannot be read.
        PluginError: the family cannot be found or loaded.
    """
    for name in checks:
        check_known("check", name, CHECKS)
    check_known("dtype", dtype, WEIGHT_DTYPES)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"prompts of {max_tokens} tokens are not possible", hint="use 1 or more.")
    directory = Path(checkpoint_dir)
    advance = progress or (lambda check, more, total: None)
    verifier: CheckpointVerifier | DirectoryVerifier
    if kind_of(directory) is HF_MODEL:
        from phireg.verification.directories import DirectoryVerifier

        verifier = DirectoryVerifier(directory, advance)
    else:
        verifier = CheckpointVerifier(directory, advance)
    with verifier.files:
        if set(checks) - set(QUICK):  # an unknown device is an error before any byte is compared
            verifier.open_computed(device, dtype, max_tokens)
        verifier.plan_source(str(model_dir), family, revision, Readings(weights, adapter, tie))
        results = [make_check(n, partial(verifier.make, n)) for n in CHECKS if n in checks]
    return Verification(
        str(checkpoint_dir),
        str(model_dir),
        verifier.plan.family,
        verifier.config,
        tuple(results),
        verifier.computed.result if verifier.computed else None,
        ((verifier.label, str(directory)), *verifier.provenance()),
    )


class CheckpointVerifier(Verifier):
    """Makes the checks of a checkpoint."""

    label = "checkpoint"

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, checkpoint_config(path), progress)
        self.tp_size = world_size(self.config)
        self.files = RankFiles(path, self.tp_size)
        block = self.config.get("quantization")
        self.quantization: Mapping[str, Any] = block if isinstance(block, Mapping) else {}

    def options(self) -> dict[str, Any]:
        """Return the options of a conversion that config.json tells of."""
        dtype = self.config.get("dtype")
        # None for algorithms that phireg does not write.
        qformat = QFORMATS.get(str(self.quantization.get("quant_algo")))
        cache = CACHE_DTYPES.get(str(self.quantization.get("kv_cache_quant_algo")))
        mapping = self.config.get("mapping")
        ep_size = mapping.get("moe_ep_size") if isinstance(mapping, Mapping) else None
        possible = isinstance(ep_size, int) and ep_size > 1 and self.tp_size % ep_size == 0
        return {
            "dtype": dtype if isinstance(dtype, str) and dtype in WEIGHT_DTYPES else "auto",
            "tp_size": self.tp_size,
            "qformat": qformat,
            "kv_cache_dtype": cache if qformat is not None else None,
            "moe_ep_size": ep_size if possible else None,
        }

    def structure(self) -> Outcome:
        """Check names, shapes, dtypes and keys against the reader's rules."""
        tensors = self.files.kinds()
        problems = _unreadable(self.files)
        harmless: list[Problem] = []
        for where, text, is_harmless in structure_findings(self.config, tensors):
            (harmless if is_harmless else problems).append(Problem(where, text))
        problems += scale_defects(self.files)
        problems += [Problem(name, text) for name, text in self.files.surplus()]
        count = sum(map(len, tensors))
        summary = f"{count} tensors in {self.tp_size} rank file{'s'[: self.tp_size > 1]}"
        return Outcome(summary, _folded(problems), list(map(str, _folded(harmless))))

    def config_json(self) -> Outcome:
        """Compare config.json with the one that a conversion of the source would write."""
        if not self.plan.config:
            raise Skipped(f"the source cannot be planned: {self.plan.errors[0].detail}")
        expected = dict(self.plan.config)
        cache, alone = self.quantization.get("kv_cache_quant_algo"), []
        if cache in CACHE_DTYPES and self.quantization.get("quant_algo") is None:
            expected["quantization"] = {**expected["quantization"], "kv_cache_quant_algo": cache}
            alone = ["only the KV cache is quantized; phireg writes no such checkpoints"]
        problems, notes = compare_configs(self.config, expected)
        return Outcome(f"{len(self.plan.config)} keys compared", problems, notes + alone)

    def weights(self) -> Outcome:
        """Compare the rank files with the source."""
        algorithm = self.quantization.get("quant_algo")
        if algorithm not in KNOWN:
            raise Skipped(f"quantized as {algorithm!r}, whose tensors phireg does not know")
        if self.plan.errors:
            error = self.plan.errors[0]
            raise Skipped(
                f"the source has no plan at TP {self.tp_size}: {error.subject} {error.detail}"
            )
        keys = ("architecture", "hidden_size")
        if other := self.other_model(**{key: self.config.get(key) for key in keys}):
            return Outcome("no values compared: the source is another model", other, [])
        recorded = (self.manifest or {}).get("quantization")
        alpha = recorded.get("alpha") if isinstance(recorded, Mapping) else None
        summary, problems, notes, *_ = compare_weights(
            self.plan,
            self.files,
            float(alpha) if isinstance(alpha, int | float) else None,
            lambda more, total: self.progress("weights", more, total),
        )
        command = ["phireg", "postprocess", str(self.path), *self.source_arguments]
        problems = regroup_hint(problems, self.plan, None if self.manifest else command)
        return Outcome(summary, _folded(problems), notes)

    def written(self) -> Iterator[tuple[str, str]]:
        """Yield sizes and settings."""
        sizes = [path.stat().st_size for path in self.files.paths.values() if path.is_file()]
        before, after = size(sum(file.size for file in self.plan.source.files)), size(sum(sizes))
        ranks = f"{len(sizes)} rank files, {after} together" if len(sizes) > 1 else after
        yield "size", f"{before} before; after: {ranks}"
        yield "weights", f"{self.config.get('dtype')}, TP {self.tp_size}"


def _folded(problems: Iterable[Problem]) -> list[Problem]:
    """Fold problems that differ in their rank or layer only; the first of each group is kept."""
    by_rank: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        generic = re.sub(r"^rank\d+", "rank", problem.where)
        by_rank.setdefault((generic, problem.text), []).append(problem)
    ranked = []
    for (generic, _), same in by_rank.items():
        numbers = [int(match[0]) for p in same if (match := re.search(r"(?<=^rank)\d+", p.where))]
        where = "rank" + ranges(numbers) + generic.removeprefix("rank") if numbers else generic
        ranked.append(dataclasses.replace(same[0], where=where))
    return folded(ranked)


# The tensors: bit for bit, or by the grid where they are quantized


def compare_weights(
    plan: Plan,
    files: RankFiles,
    alpha: float | None,
    progress: Callable[[int, int], None] = lambda more, total: None,
) -> Outcome:
    """Compare every tensor of a plan without errors; ``alpha`` is SmoothQuant's, if it is known."""
    total = sum(output.nbytes for output in plan.outputs)

    def report(more: int) -> None:
        progress(more, total)

    quantized_weights = {f"{linear.target}.weight" for linear in plan.linears}

    def is_quantized(output: Output) -> bool:
        return output.name in quantized_weights or isinstance(output.origin, Scale)

    plain = restrict(plan, lambda output: not is_quantized(output)) if plan.scales else plan
    absent = [output for output in plain.outputs if not is_comparable(files, output)]
    compared = len(plain.outputs) - len(absent)
    problems = explain(plain, files, compare(plain, files, report))
    notes: list[str] = []
    comparisons: list[LinearComparison] = []
    linears: list[QuantizedLinear] = []
    if plan.scales:
        quantized = [output for output in plan.outputs if is_quantized(output)]
        missing = [output for output in quantized if not _is_readable(files, output)]
        absent += missing
        incomplete = {output.name.rpartition(".")[0] for output in missing}
        linears = [linear for linear in plan.linears if linear.target not in incomplete]
        in_groups = plan.options.scheme is not None and plan.options.scheme.grouped
        if in_groups:
            from phireg.verification.linears import compare_ranks

            found = compare_ranks(plan, files, linears, report)
            problems += found.problems
        comparisons = [] if in_groups else compare_quantized(plan, files, linears, report)
        scales = [output for output in quantized if isinstance(output.origin, Scale)]
        report(sum(output.nbytes for output in scales))
        scales = [output for output in scales if _is_readable(files, output)]
        problems += explain_quantized(plan, files, comparisons)
        problems += rank_problems(files, scales)
        problems += cache_problems(files, scales)
        deviating = list(activation_problems(plan, files, scales)) if plan.smoothed else []
        if alpha == 1:
            problems += deviating
        elif alpha is None:
            notes += [f"{text} (or it was smoothed with another alpha)" for text in deviating]
        notes += _rounding_notes(comparisons)
    problems += [
        Problem(
            f"rank{output.rank} {output.name}",
            "is missing or of another shape or dtype than planned",
            None,
            *place_of(output.name),
        )
        for output in absent
        if output.rank not in files.errors
    ]
    problems += _unreadable(files)
    return Outcome(_summary(plan, compared, len(linears)), problems, notes)


def _unreadable(files: RankFiles) -> list[Problem]:
    return [
        Problem(files.paths[rank].name, error.message.removeprefix(f"{files.paths[rank]}: "))
        for rank, error in files.errors.items()
    ]


def _is_readable(files: RankFiles, output: Output) -> bool:
    """Return True for e4m3 stored as int8 (early exporters) and scalars for [1], too."""
    kind = files.kind(output.rank, output.name)
    codes = (output.dtype, "I8") if output.dtype == "F8_E4M3" else (output.dtype,)
    shapes = (output.shape, ()) if output.shape == (1,) else (output.shape,)
    return kind is not None and kind[0] in codes and kind[1] in shapes


def _rounding_notes(comparisons: Sequence[LinearComparison]) -> list[str]:
    places = [place_of(linear.target) for linear in comparisons if linear.rounded_twice]
    if not places:
        return []
    numbers = ranges(layer for layer, _ in places if layer is not None)
    return [
        f"layers {numbers}: smoothed weights were rounded once more than needed, as exporters "
        "before modelopt 0.23 do"
    ]


def _summary(plan: Plan, compared: int, linears: int) -> str:
    casts = f"{plan.casts} source tensors cast" if plan.casts else "nothing was cast"
    if not plan.scales:
        return f"{compared} of {len(plan.outputs)} tensors compared bit for bit; {casts}"
    scheme = plan.options.scheme
    quantized = (
        f"{linears} linears within a step of the {scheme.quant_algo} grid"
        + ("" if scheme.grouped else " and scales recomputed")
        if scheme is not None and plan.linears
        else "scales of the KV cache looked at"
    )
    return f"{compared} tensors compared bit for bit; {casts}; {quantized}"
