"""Planning a conversion: the request, the family, and models that are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from phireg import registry
from phireg.config.hf import HFConfig
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import PlanError, SourceError, UsageError, check_known
from phireg.files.json import read_json_object
from phireg.formats import FORMATS, WEIGHT_BITS, Format
from phireg.planning.build import build_plan
from phireg.planning.model import DEFAULT_TARGET, SHARD_BYTES, Options, Plan
from phireg.planning.recognition import UNQUANTIZED, Refusal, recognize, without_blocks
from phireg.planning.report import problems
from phireg.ranges import largest
from phireg.registry import AUTO, FamilyChoice, load_target
from phireg.source.hub import resolve_model_dir
from phireg.source.model import Source
from phireg.source.readings import Readings, open_source
from phireg.targets.readers import elsewhere
from phireg.targets.target import Target

MODALITIES = ("vision_config", "img_processor", "embd_layer", "audio_config", "audio_processor")

_LLAMAFIED = (
    "some tools save a Phi-3 or Phi-4 so. If this is one, say so in config.json: "
    '"architectures": ["Phi3ForCausalLM"] and "model_type": "phi3" (separate projections are '
    "converted). TensorRT-LLM's own LLaMA converter takes it as it is."
)
_ADVICE = {"LlamaForCausalLM": _LLAMAFIED, "MistralForCausalLM": _LLAMAFIED}
"""What to do with models of other classes, by the class that config.json names."""


def plan(
    model_dir: str | Path,
    *,
    family: str = AUTO,
    revision: str | None = None,
    dtype: str = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    qformat: str | None = None,
    kv_cache_dtype: str | None = None,
    moe_tp_size: int | None = None,
    moe_ep_size: int | None = None,
    weights: str | None = None,
    adapter: str | None = None,
    tie: bool | None = None,
    target: str = DEFAULT_TARGET,
    max_shard_size: int = SHARD_BYTES,
    exclude: Sequence[str] = (),
    quantize_lm_head: bool = False,
    form: str | None = None,
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
        qformat: a key of :data:`phireg.formats.FORMATS` that the target's readers take.
        kv_cache_dtype: ``fp8`` or ``int8`` for a quantized KV cache, beside a ``qformat``.
        moe_tp_size: number of ranks that divide each expert of a mixture.
        moe_ep_size: number of ranks that share the experts out. The product of both is
            ``tp_size``; without them every expert is divided over all ranks.
        weights: the weights file, or the index, to read where the directory has several sets.
        adapter: ``merge`` or ``ignore`` for a LoRA adapter that lies beside the weights.
        tie: whether lm_head is the embedding, where config.json and files disagree.
        target: what is written: a name or ``distribution:name`` of the installed targets.
        max_shard_size: bytes of a file at most, for targets whose files are no ranks'.
        form: ``llama`` to write a model of Phi-3's architecture as one of transformers' Llama class
            (``--as``), with target ``hf``.
        exclude: patterns of modules that stay unquantized, for targets whose readers know lists.
        quantize_lm_head: quantize lm_head as well, for such targets.

    Raises:
        UsageError: an option has a value that makes no sense.
        SourceError: the model cannot be read, or is not one phireg converts.
        PluginError: the family cannot be found or loaded.
    """
    _check_sizes(dtype, tp_size, pp_size)
    written = load_target(target, form)
    if not written.by_rank and (tp_size > 1 or moe_tp_size or moe_ep_size):
        raise UsageError(
            f"--target {written.name} has no ranks: its readers divide the model themselves",
            hint="leave out --tp-size, --moe-tp-size and --moe-ep-size.",
        )
    if written.by_rank and max_shard_size != SHARD_BYTES:
        raise UsageError(
            f"--max-shard-size has no effect: --target {written.name} has a file for every rank",
            hint="leave it out.",
        )
    check_format(written, qformat, kv_cache_dtype, exclude)
    options = Options(
        dtype,
        tp_size,
        qformat,
        kv_cache_dtype,
        _moe_ep_size(tp_size, moe_tp_size, moe_ep_size),
        Readings(weights, adapter, tie),
        target,
        max_shard_size,
        tuple(exclude),
        quantize_lm_head,
        form,
    )
    if quantize_lm_head:
        _check_head(written, options.format)
    directory, commit = resolve_model_dir(str(model_dir), revision)
    if directory.is_dir() and not os.path.lexists(directory / "config.json"):
        open_source(directory)  # refuses other kinds of directories by name
    hf = HFConfig(read_json_object(directory / "config.json"))
    if not hf.architectures and not hf.model_type:
        open_source(directory)
    plain = without_blocks(hf)  # the headers tell whether the weights are quantized
    choice = choose_family(plain, family)
    source, refusals = recognize(hf, open_source(directory, commit, options.readings))
    if refusals:
        raise _refused("the files of this model are not what phireg converts", refusals)
    return build_plan(choice, plain, source, options, str(model_dir))


def plan_config(
    model_dir: str | Path, *, family: str = AUTO, dtype: str = "auto", tp_size: int = 1
) -> Plan:
    """Plan a checkpoint's config.json from the model's alone: no weights are needed.

    The plan has no outputs and cannot be carried out; without a dtype in config.json, ``auto`` is
    float16. Raises a PlanError if the config has errors.
    """
    _check_sizes(dtype, tp_size)
    directory = Path(model_dir)
    if not directory.is_dir():
        raise SourceError(
            f"{str(model_dir)!r}: no such directory", hint="give one that has a config.json."
        )
    hf = HFConfig(read_json_object(directory / "config.json"))
    choice, options = choose_family(hf, family), Options(dtype, tp_size)
    plan = build_plan(choice, hf, Source(directory, {}, ()), options, str(model_dir))
    if errors := [finding for finding in plan.errors if finding.code != "missing"]:
        raise PlanError(f"the model's config.json has problems\n{problems(errors)}")
    return plan


def choose_family(hf: HFConfig, family: str) -> FamilyChoice:
    """Return the family that claims a config, or the named one if it fits."""
    if reasons := list(_refusals(hf)):
        raise _refused("config.json does not describe a model phireg converts", reasons)
    try:
        choice = registry.choose(hf) if family == AUTO else registry.load(family)
    except SourceError as error:
        raise SourceError(error.message, hint=_advice(hf) or error.hint) from None
    if refusal := choice.family.refusal(hf):
        raise SourceError(
            f"this model cannot be converted as {choice.family.name}: {refusal}",
            hint=_advice(hf) or "leave out --family to let config.json decide.",
        )
    return choice


def _advice(hf: HFConfig) -> str | None:
    """What to do with a model of a class that is known here, and not as a Phi."""
    return next((_ADVICE[name] for name in hf.architectures if name in _ADVICE), None)


def _refused(message: str, reasons: Sequence[Refusal]) -> SourceError:
    """Return the error that lists all reasons, each with what to do."""
    if len(reasons) == 1:
        return SourceError(f"{message}:\n    {reasons[0][0]}", hint=reasons[0][1])
    lines = "".join(f"\n    {reason}: {advice}" for reason, advice in reasons)
    return SourceError(f"{message}:{lines}")


def _refusals(hf: HFConfig) -> Iterator[Refusal]:
    """Yield what speaks of a quantized, multimodal or encoder-decoder model, or of none at all."""
    if hf.has("quantization_config"):
        method = hf.get("quantization_config.quant_method") or "unnamed method"
        yield f"it is already quantized (quantization_config, {method})", UNQUANTIZED
    # phi-1's first configs say embd_layer "default", of a plain embedding.
    modalities = [key for key in MODALITIES if hf.has(key) and hf.get(key) != "default"]
    if modalities:
        yield (
            f"it is multimodal ({', '.join(modalities)})",
            "phireg converts text models only; extract the language model first.",
        )
    if hf.get("is_encoder_decoder"):
        yield "it is an encoder-decoder model", "phireg converts decoder-only Phi models."
    if hf.has("peft_type") or hf.has("base_model_name_or_path"):
        yield "it configures a LoRA adapter", "merge it into its base model first."
    names = hf.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        yield (
            f"its architectures are {names!r}, not a list of names",
            "this is not the config.json of a transformers model.",
        )
    if not hf.architectures and not hf.model_type:
        yield (
            "it names neither architectures nor model_type",
            "this is not the config.json of a transformers model.",
        )


def _check_sizes(dtype: str, tp_size: int, pp_size: int = 1) -> None:
    check_known("dtype", dtype, ("auto", *WEIGHT_DTYPES))
    if not 1 <= tp_size <= largest("tp_size"):
        raise UsageError(
            f"tp size {tp_size} is not a number of ranks", hint=f"use 1 to {largest('tp_size')}."
        )
    if pp_size != 1:
        raise UsageError(
            f"pipeline parallelism ({pp_size} stages) is not possible for Phi: TensorRT-LLM's Phi "
            "models create the embedding and the head on every rank and pass nothing between "
            "stages",
            hint="use --tp-size instead.",
        )


def check_format(
    target: Target, qformat: str | None, cache: str | None, exclude: Sequence[str] = ()
) -> None:
    """Raise a UsageError if a format, a cache or exclusions do not fit the target."""
    if qformat is not None:
        check_known("quantization format", qformat, FORMATS)
    if qformat is not None and qformat not in target.layouts:
        nearest = near_format(FORMATS[qformat], target)
        others = elsewhere(qformat, target.name)
        raise UsageError(
            f"no reader of --target {target.name} takes {qformat}"
            + (f"; those of {others} do" if others else ""),
            hint=(
                f"the nearest format that phireg quantize makes for them is {nearest}."
                if nearest
                else ""
            )
            or "choose another --target: phireg families lists what each takes.",
        )
    if qformat is None and (cache is not None or target.only_quantized):
        what = f"--target {target.name}" if cache is None else f"KV cache dtype '{cache}'"
        raise UsageError(
            f"{what} needs a quantization format",
            hint=f"phireg quantize --qformat makes {', '.join(target.formats) or 'none for it'}"
            + ("; --target hf writes 16 bits." if target.only_quantized else "."),
        )
    if cache is not None:
        check_known(f"KV cache dtype of --target {target.name}:", cache, target.kv_caches)
    if exclude and (qformat is None or target.by_rank):
        why = "nothing is quantized" if qformat is None else "engines quantize every layer alike"
        raise UsageError(f"--exclude has no effect: {why}", hint="leave it out.")


def _check_head(target: Target, form: Format | None) -> None:
    """Raise a UsageError if lm_head cannot be quantized so."""
    why = None
    if form is None:
        why = "nothing is quantized"
    elif target.by_rank:
        why = f"not every reader of --target {target.name} takes a quantized lm_head"
    elif form.smoothing == "awq":
        why = f"the factors of {form.name} are searched for the layers alone"
    if why is not None:
        raise UsageError(f"--quantize-lm-head is not possible: {why}", hint="leave it out.")


def near_format(wanted: Format, target: Target) -> str | None:
    """Return the target's format that is most like one that it does not have."""

    def distance(name: str) -> tuple[bool, bool, bool, bool]:
        form = FORMATS[name]
        return (
            WEIGHT_BITS[form.weight] != WEIGHT_BITS[wanted.weight],
            (form.inputs is None) != (wanted.inputs is None),
            form.weight != wanted.weight,
            form.per != wanted.per,
        )

    return min(target.formats, key=distance, default=None)


def _moe_ep_size(tp_size: int, moe_tp_size: int | None, moe_ep_size: int | None) -> int | None:
    """The number of ranks that share the experts out; None if not given."""
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
