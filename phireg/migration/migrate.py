"""Carrying a checkpoint's tensors over to a Hugging Face directory.

The directory is planned as if it were quantized anew. Its weights are then read out of the rank
files, where they are quantized already, and its scales are those of the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from phireg.checkpoint.inspect import inspect
from phireg.checkpoint.manifest import check_weights, read_manifest
from phireg.checkpoint.rankfiles import Bits, RankFiles, world_size
from phireg.config.hf import HFConfig
from phireg.conversion.convert import Converted, check_plan, write_checkpoint
from phireg.conversion.quantizer import Scales, WeightQuantizer
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import CheckError, UsageError
from phireg.files.json import read_json_object
from phireg.files.kinds import CHECKPOINT, check_kind
from phireg.files.regular import bullets
from phireg.layout.rules import Rules
from phireg.migration.inverse import Piece, RankSource, invert, read_rows, stated_source
from phireg.planning.build import build_plan
from phireg.planning.model import SHARD_BYTES, Options, Output, Plan, Rows, Scale
from phireg.planning.plan import check_format, choose_family
from phireg.planning.schedule import schedule
from phireg.reader.schemes import CACHE_DTYPES, QFORMATS, SCHEMES
from phireg.registry import AUTO, load_target
from phireg.source.hub import resolve_model_dir
from phireg.source.tensors import WeightsFile
from phireg.targets.huggingface import modules_of
from phireg.targets.target import KEY_SCALE, KV_SCALE, VALUE_SCALE
from phireg.verification.config import compare_configs


def migrate(
    checkpoint_dir: str | Path,
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    target: str = AUTO,
    family: str = AUTO,
    revision: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write a TensorRT-LLM checkpoint of any producer and number of ranks as another target.

    Quantized values and scales are carried over bit for bit. What several ranks hold is compared.

    Args:
        checkpoint_dir: with config.json and rank files.
        model_dir: config.json and tokenizer of the model it was made from; no weights are needed.
        output_dir: the directory to make; must not exist, or be empty.
        target: a Hugging Face target; ``auto`` is hf-modelopt for quantized files, else hf.
        family: a family name, ``distribution:name``, or ``auto`` to decide by config.json.
        revision: branch, tag or commit of a hub repository.
        max_shard_size: bytes of a file at most.
        overwrite: replace the output if phireg wrote it, once the new one is complete.
        progress: takes (further bytes read or written, all of them).

    Raises:
        UsageError: the target has ranks, or its readers do not take the checkpoint's format.
        CheckError: the checkpoint is not one of this model, or is damaged.
        SourceError: a file cannot be read.
        OutputError: the output exists, or cannot be written.
    """
    if target != AUTO and load_target(target).by_rank:
        raise UsageError(
            f"--target {target} is what phireg migrates from",
            hint="choose a Hugging Face target, such as hf-modelopt or hf.",
        )
    checkpoint = Path(checkpoint_dir)
    check_kind(checkpoint, CHECKPOINT)
    config = read_json_object(checkpoint / "config.json")
    with RankFiles(checkpoint, world_size(config)) as files:
        if problems := inspect(checkpoint).problems:
            raise _unfit(checkpoint, problems)
        options = _options(config, target, max_shard_size)
        directory, commit = resolve_model_dir(str(model_dir), revision)
        migration = _Migration(directory, commit, family, options, str(checkpoint))
        migration.check_config(config)
        plan = migration.plan(files)
        manifest = read_manifest(checkpoint)
        read = sum(file.path.stat().st_size for file in files.values()) if manifest else 0

        def report(more: int) -> None:
            if progress is not None:
                progress(more, plan.tensor_bytes + read)

        if manifest and (defects := list(check_weights(checkpoint, manifest, report))):
            raise _unfit(checkpoint, defects)

        def carried() -> WeightQuantizer:
            return WeightQuantizer(plan, Scales(migration.scales(files), {}))

        return write_checkpoint(
            plan,
            Path(output_dir),
            overwrite=overwrite,
            allow_overflow=False,
            progress=report,
            quantizer=carried if plan.scales else None,
            quantization={"migrated_from": str(checkpoint)} if plan.scales else None,
        )


def _unfit(checkpoint: Path, defects: Iterable[str]) -> CheckError:
    return CheckError(
        f"{checkpoint} cannot be migrated; nothing was written{bullets([*defects], 20)}",
        hint="phireg verify tells what a checkpoint is and where it differs from its model.",
    )


def _options(config: Mapping[str, Any], target: str, max_shard_size: int) -> Options:
    """Return the options that the checkpoint was made with, and the target."""
    quantization, mapping = config.get("quantization") or {}, config.get("mapping") or {}
    algorithm = quantization.get("quant_algo")
    qformat = QFORMATS.get(str(algorithm))
    if qformat is None and algorithm is not None:
        raise UsageError(
            f"the checkpoint is quantized as {algorithm!r}, whose tensors phireg does not know",
            hint="quantize the model anew: phireg quantize.",
        )
    cache = CACHE_DTYPES.get(str(quantization.get("kv_cache_quant_algo")))
    if qformat is not None and SCHEMES[qformat].weight is None:
        qformat = None  # files hold the raw weights, which the builder quantizes
    if target == AUTO:
        target = "hf" if qformat is None else "hf-modelopt"
    written = load_target(target)
    check_format(written, qformat, None)
    unfit = None if cache in (None, *written.kv_caches) else f"takes no {cache} KV cache"
    held = load_target("trtllm").layouts[qformat].scales if qformat is not None else {}
    for what, stored in written.layouts[qformat].scales.items() if qformat is not None else ():
        ours = held.get(what)
        if ours is not None and (ours.code, ours.divides) != (stored.code, stored.divides):
            unfit = f"has {stored.name} in another dtype, or its reciprocal: it would be rounded"
    if unfit is not None:
        raise UsageError(
            f"--target {target} {unfit}",
            hint="choose another --target, or quantize the model anew: phireg quantize.",
        )
    return Options(
        str(config.get("dtype")),
        int(mapping.get("tp_size", 1)),
        qformat,
        cache,
        int(mapping.get("moe_ep_size") or 1) if "moe" in config else None,
        target=target,
        max_shard_size=max_shard_size,
    )


def _as_stored(output: Output) -> Output:
    """Return an output whose rows are those of a source that is packed like it."""
    if output.packing == (1, 1) or not isinstance(output.origin, Rows):
        return output
    height = output.packing[0]
    spans = tuple(
        dataclasses.replace(span, start=span.start // height, count=span.count // height)
        for span in output.origin.spans
    )
    return dataclasses.replace(output, origin=Rows(spans), packing=(1, 1))


class _Migration:
    """The plan that makes such a checkpoint, and the one that makes the directory."""

    def __init__(
        self, directory: Path, commit: str | None, family: str, options: Options, checkpoint: str
    ) -> None:
        hf = HFConfig(read_json_object(directory / "config.json"))
        choice = choose_family(hf, family)
        translation = choice.family.config_fields().translate(hf)
        self.checkpoint = checkpoint
        self.rules = Rules()
        code = WEIGHT_DTYPES.get(options.dtype, "")
        if translation.ok:
            self.rules = choice.family.weight_rules(translation.fields, hf)
        source = dataclasses.replace(stated_source(directory, self.rules, code), revision=commit)

        def planned(wanted: Options) -> Plan:
            plan = build_plan(choice, hf, source, wanted, checkpoint)
            check_plan(plan)
            return plan

        self.forward = planned(dataclasses.replace(options, target="trtllm"))
        self.backward = planned(dataclasses.replace(options, tp_size=1, moe_ep_size=None))
        if any(linear.folded for linear in self.backward.linears):
            raise UsageError(
                f"--target {options.target} has AWQ's factors in norms and rows, and the "
                "checkpoint has them beside each linear",
                hint="quantize the model anew: phireg quantize.",
            )
        self.pieces = invert(self.forward)

    def check_config(self, config: Mapping[str, Any]) -> None:
        if self.forward.options.qformat is None:  # what the builder is to do does not matter
            config = {**config, "quantization": self.forward.config["quantization"]}
        problems, _ = compare_configs(config, self.forward.config)
        if problems:
            texts = [f"{problem.where}: {problem.text}" for problem in problems]
            raise _unfit(Path(self.checkpoint), texts)

    def plan(self, files: RankFiles) -> Plan:
        """Return the directory's plan with the rank files as its source."""
        plan = self.backward
        tensors = dict(plan.source.tensors)
        outputs = tuple(map(_as_stored, plan.outputs))
        for planned, output in zip(plan.outputs, outputs, strict=True):
            for span in output.origin.spans if isinstance(output.origin, Rows) else ():
                if span.source is not None:
                    tensor, (rows, columns) = plan.source.tensors[span.source], planned.packing
                    stored = self.pieces[span.source][0].output.dtype
                    code = stored if planned.packing == (1, 1) else output.dtype
                    shape = (tensor.shape[0] // rows, *(n // columns for n in tensor.shape[1:]))
                    tensors[span.source] = dataclasses.replace(tensor, dtype=code, shape=shape)
        listed = tuple(
            WeightsFile(file.path.name, file.header.digest, file.header.stamp)
            for file in files.values()
        )
        source = RankSource(
            plan.source.directory,
            tensors,
            listed,
            plan.source.revision,
            rank_files=files,
            pieces=self.pieces,
        )
        tasks = schedule(outputs, tensors)
        return dataclasses.replace(plan, source=source, outputs=outputs, linears=(), tasks=tasks)

    def scales(self, files: RankFiles) -> dict[str, Bits]:
        places = self._places(files)
        groups = {
            span.source: output.origin.groups
            for output in self.backward.outputs
            if isinstance(output.origin, Scale)
            for span in output.origin.spans
        }
        return {
            name: read_rows(
                files, places[name], name, scale.dtype, 0, scale.size // width, width
            ).reshape(-1)
            for name, scale in self.backward.scales.items()
            for width in (groups.get(name, 1),)
        }

    def _places(self, files: RankFiles) -> dict[str, list[Piece]]:
        """Return where the elements of each scale lie, by its name in the directory's plan.

        Scales of rows have the name of the same source module in both plans. Those of a whole
        linear belong to the modules that it is made of; those of experts to each one's.
        """
        places = dict(self.pieces)
        made_of = modules_of(self.rules)
        for name in self.forward.scales:
            target, _, companion = name.rpartition(".")
            rule = self.rules.get(target)
            if rule is None:
                continue
            modules = made_of[target]
            share = len(modules) // rule.experts if rule.experts else len(modules)
            for number, module in enumerate(modules):
                own = self.pieces[name]
                if rule.experts and self.forward.scales[name].size > 1:
                    own = [
                        piece.row_only(number // share)
                        for piece in own
                        if piece.has(number // share)
                    ]
                places[f"{module}.{companion}"] = own
        attention = self.backward.kv_caches
        for module, ours in zip(self.forward.kv_caches, attention, strict=True):
            joint = self.pieces[f"{module}.{KV_SCALE}"]
            for companion in (KEY_SCALE, VALUE_SCALE):
                # Some exporters write both beside the one that TensorRT-LLM reads.
                apart = f"{module}.{companion}"
                known = all(files.kind(rank, apart) is not None for rank in files)
                places[f"{ours}.{companion}"] = [
                    dataclasses.replace(piece, output=dataclasses.replace(piece.output, name=apart))
                    if known
                    else piece
                    for piece in joint
                ]
        return places
