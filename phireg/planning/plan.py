"""Planning a conversion."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from phireg import registry
from phireg.config.hf import HFConfig
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import PlanError, SourceError, UsageError
from phireg.files.json import read_json_object
from phireg.planning.build import build_plan
from phireg.planning.model import Options, Plan
from phireg.planning.report import problems
from phireg.planning.unsupported import check_model
from phireg.reader.schemes import KV_CACHES, SCHEMES, WEIGHT_ONLY
from phireg.registry import AUTO, FamilyChoice
from phireg.source.hub import resolve_model_dir
from phireg.source.model import open_source, without_weights


def plan(
    model_dir: str | Path,
    *,
    family: str = AUTO,
    revision: str | None = None,
    dtype: str = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    weight_only: str | None = None,
    qformat: str | None = None,
    kv_cache_dtype: str | None = None,
    moe_tp_size: int | None = None,
    moe_ep_size: int | None = None,
) -> Plan:
    """Plan a conversion or quantization from config.json and file headers alone.

    Look at the plan's ``errors`` before carrying it out.

    Args:
        model_dir: a directory, or a repository on the Hugging Face hub.
        family: a family name, ``distribution:name``, or ``auto`` to decide by config.json.
        revision: branch, tag or commit of a hub repository.
        dtype: ``auto``, ``float16``, ``bfloat16`` or ``float32``.
        tp_size: number of tensor-parallel ranks.
        pp_size: must be 1.
        weight_only: ``int8`` or ``int4`` for the portable weight-only form; the same as the
            ``qformat`` ``int8_wo`` or ``int4_wo``.
        qformat: ``fp8``, ``int8_sq``, ``int8_wo`` or ``int4_wo``.
        kv_cache_dtype: ``fp8`` or ``int8`` for a quantized KV cache, beside a ``qformat``.
        moe_tp_size: over how many ranks each expert of a mixture is divided.
        moe_ep_size: over how many ranks the experts are shared out. The product of both is
            ``tp_size``; without them every expert is divided over all ranks.

    Raises:
        UsageError: an option has a value that makes no sense.
        SourceError: the model cannot be read, or is not one phireg converts.
        PluginError: the family cannot be found or loaded.
    """
    qformat = _qformat(qformat, weight_only, kv_cache_dtype)
    options = _options(dtype, tp_size, pp_size, qformat, kv_cache_dtype)
    shared = _moe_ep_size(tp_size, moe_tp_size, moe_ep_size)
    options = dataclasses.replace(options, moe_ep_size=shared)
    directory, commit = resolve_model_dir(str(model_dir), revision)
    if directory.is_dir() and not (directory / "config.json").exists():
        open_source(directory)  # may know better what this directory is
    hf = HFConfig(read_json_object(directory / "config.json"))
    if not hf.architectures and not hf.model_type:
        open_source(directory)
    chosen = choose_family(hf, family)
    source = open_source(directory, commit)
    return build_plan(chosen, hf, source, options, str(model_dir))


def plan_config(
    model_dir: str | Path, *, family: str = AUTO, dtype: str = "auto", tp_size: int = 1
) -> Plan:
    """Plan a checkpoint's config.json alone, from the model's: no weights are needed.

    The plan's ``config`` is that of a conversion; it has no outputs and cannot be carried out.

    Args:
        model_dir: a local directory with a config.json.
        family: as for :func:`plan`.
        dtype: as for :func:`plan`; a config that names none counts as float16.
        tp_size: number of tensor-parallel ranks.

    Raises:
        PlanError: the config has errors.
        PhiregError: as :func:`plan`.
    """
    options = _options(dtype, tp_size, 1, None, None)
    directory = Path(model_dir)
    if not directory.is_dir():
        raise SourceError(
            f"{str(model_dir)!r}: no such directory", hint="give one that has a config.json."
        )
    hf = HFConfig(read_json_object(directory / "config.json"))
    chosen = choose_family(hf, family)
    plan = build_plan(chosen, hf, without_weights(directory), options, str(model_dir))
    errors = [finding for finding in plan.errors if finding.code != "missing"]
    if errors:
        raise PlanError(f"the model's config.json has problems\n{problems(errors)}")
    return plan


def choose_family(hf: HFConfig, family: str) -> FamilyChoice:
    """Return the family of a config: the one that claims it, or the named one if it fits.

    Raises:
        SourceError: none fits.
        PluginError: the family cannot be found or loaded.
    """
    check_model(hf)
    chosen = registry.choose(hf) if family == AUTO else registry.load(family)
    refusal = chosen.family.refusal(hf)
    if refusal:
        raise SourceError(
            f"this model cannot be converted as {chosen.family.name}: {refusal}",
            hint="leave out --family to let config.json decide.",
        )
    return chosen


def _qformat(qformat: str | None, weight_only: str | None, cache: str | None) -> str | None:
    if weight_only is not None and weight_only not in WEIGHT_ONLY:
        raise UsageError(
            f"unknown weight-only precision '{weight_only}'",
            hint=f"known: {', '.join(WEIGHT_ONLY)}.",
        )
    if qformat is not None and qformat not in SCHEMES:
        raise UsageError(
            f"unknown quantization format '{qformat}'", hint=f"known: {', '.join(SCHEMES)}."
        )
    if weight_only is not None:
        if qformat not in (None, f"{weight_only}_wo"):
            raise UsageError(
                f"weight-only precision '{weight_only}' and quantization format '{qformat}' "
                "exclude each other",
                hint="leave one of them out.",
            )
        qformat = f"{weight_only}_wo"
    if cache is not None and cache not in KV_CACHES:
        raise UsageError(
            f"unknown KV cache dtype '{cache}'", hint=f"known: {', '.join(KV_CACHES)}."
        )
    if cache is not None and qformat is None:
        raise UsageError(
            f"KV cache dtype '{cache}' needs a quantization format",
            hint=f"choose one of {', '.join(SCHEMES)}.",
        )
    return qformat


def _moe_ep_size(tp_size: int, moe_tp_size: int | None, moe_ep_size: int | None) -> int | None:
    """The number of ranks that share the experts out; None if nobody spoke of experts."""
    if moe_tp_size is None and moe_ep_size is None:
        return None
    for size in (moe_tp_size, moe_ep_size):
        if size is not None and (size < 1 or tp_size % size):
            raise UsageError(
                f"experts cannot be spread over {size} of {tp_size} ranks",
                hint="moe tp size times moe ep size is the tp size.",
            )
    shared = moe_ep_size or tp_size // (moe_tp_size or 1)
    if moe_tp_size is not None and moe_tp_size * shared != tp_size:
        raise UsageError(
            f"moe tp size {moe_tp_size} times moe ep size {shared} is not the tp size {tp_size}",
            hint="leave one of them out.",
        )
    return shared


def _options(
    dtype: str, tp_size: int, pp_size: int, qformat: str | None, kv_cache_dtype: str | None
) -> Options:
    if dtype != "auto" and dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"unknown dtype '{dtype}'", hint=f"known: auto, {', '.join(WEIGHT_DTYPES)}."
        )
    if tp_size < 1:
        raise UsageError(f"tp size {tp_size} is not a number of ranks", hint="use 1 or more.")
    if pp_size != 1:
        raise UsageError(
            f"pipeline parallelism ({pp_size} stages) is not possible for Phi: TensorRT-LLM's Phi "
            "models create the embedding and the head on every rank and pass nothing between "
            "stages",
            hint="use --tp-size instead.",
        )
    return Options(dtype, tp_size, qformat, kv_cache_dtype)
