"""What the files of a model directory are, told by their headers, which outrank config.json.

Runs before the plan, so that weights of another kind are one line with one thing to do, and not a
missing, a wrong and a surplus tensor for every linear.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from phireg.config.hf import HFConfig
from phireg.dtypes import WEIGHT_DTYPES
from phireg.findings import Finding, Severity
from phireg.layout.rules import Rules
from phireg.source.model import Source
from phireg.source.tensors import SourceTensor

Refusal = tuple[str, str]
"""What a model is, and what to do about it."""

UNQUANTIZED = "convert the unquantized model; quantize afterwards."
SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which ModelOpt, GPTQ and AWQ describe the weights beside them."""

BLOCKS = ("quantization_config", "compression_config", "quantization")
"""Keys under which makers of quantized models write how they did it."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch.compile and FSDP insert, at the beginning or inside."""

_PREFIXES = ("module.", "base_model.model.", "model.language_model.", "language_model.")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PLAIN = {*WEIGHT_DTYPES.values(), "F64"}


@dataclass(frozen=True, slots=True)
class _Leaves:
    """The last parts of all names, with one name of each; and the dtypes of weights."""

    names: Mapping[str, str]
    dtypes: Counter[str]
    method: str  # that config.json states

    def has(self, *leaves: str) -> bool:
        return all(leaf in self.names for leaf in leaves)

    def ends(self, text: str) -> bool:
        return any(leaf.endswith(text) for leaf in self.names)


_MAKERS: tuple[tuple[str, str, Callable[[_Leaves], bool]], ...] = (
    ("bitsandbytes (4 bits)", "absmax", lambda x: x.has("absmax") or x.ends("__nf4")),
    ("bitsandbytes (8 bits)", "SCB", lambda x: x.has("SCB")),
    ("MLX", "scales", lambda x: x.has("scales", "biases") and x.dtypes["U32"] > 0),
    ("AutoRound", "qweight", lambda x: x.has("qweight") and "round" in x.method),
    ("GPTQ", "qweight", lambda x: x.has("qweight") and (x.has("g_idx") or "gptq" in x.method)),
    ("AWQ", "qweight", lambda x: x.has("qweight")),
    ("HQQ", "W_q", lambda x: x.has("W_q")),
    ("AQLM", "codebooks", lambda x: x.has("codebooks")),
    ("VPTQ", "centroids", lambda x: x.has("centroids")),
    ("Quanto", "_data", lambda x: x.has("_data") and x.has("_scale")),
    ("compressed-tensors", "weight_packed", lambda x: x.has("weight_packed")),
    (
        "compressed-tensors",
        "weight_scale",
        lambda x: x.has("weight_scale") and "compressed" in x.method,
    ),
    ("ModelOpt (NVFP4)", "weight_scale_2", lambda x: x.has("weight_scale_2")),
    ("DeepSeek's FP8 recipe", "weight_scale_inv", lambda x: x.has("weight_scale_inv")),
    ("ModelOpt", "input_scale", lambda x: x.has("weight_scale", "input_scale")),
    ("a tool that writes FP8 or INT8 with scales", "weight_scale", lambda x: x.has("weight_scale")),
)
"""Makers of quantized weights: name, the leaf that shows it, and the test, the most special first.
"""


def without_blocks(hf: HFConfig) -> HFConfig:
    """Return a config without what it says of quantization."""
    for key in BLOCKS:
        if hf.has(key):
            hf = hf.having(key, None)
    return hf


def recognize(hf: HFConfig, source: Source) -> tuple[Source, tuple[Refusal, ...]]:
    """Return the source that names, dtypes and shapes tell, and what forbids its conversion."""
    tensors = source.tensors
    quantized = list(_quantized(hf, tensors))
    refusals = (*_adapted(tensors), *_placeholders(tensors), *_experts(hf, tensors), *quantized)
    if quantized:
        return source, refusals
    detail = "dropped: no weight is quantized, the block is left from another model"
    blocks = [key for key in BLOCKS if hf.has(key)]
    notes = [Finding(Severity.NOTE, "config", key, detail) for key in blocks]
    notes += [
        Finding(Severity.NOTE, "source", name, "ignored: no weight is quantized")
        for name in SIDE_FILES
        if (source.directory / name).exists()
    ]
    return dataclasses.replace(source, findings=(*source.findings, *notes)), refusals


def unwrapped(source: Source, rules: Rules) -> tuple[Source, list[Finding]]:
    """Leave out what wrappers add to names unknown to the family; add names that it knows."""
    axes = [axis for rule in rules.values() for axis in rule.weight]
    needed = {f"{module}.weight" for axis in axes for module, _ in axis.sources}
    if known := {name: x for name, x in source.aliases.items() if name in needed}:
        both = MappingProxyType({**source.tensors, **known})
        source = dataclasses.replace(source, tensors=both)
    present = needed & source.tensors.keys()
    names = {name: name for name in source.tensors}  # the final name of each
    notes: list[Finding] = []
    for part in _WRAPPERS:
        shorter = {name: re.sub(rf"(?<![^.]){re.escape(part)}", "", x) for name, x in names.items()}
        if shorter != names:
            names = shorter
            notes.append(_note(part, "stands in names and is left out"))
    while prefix := _shared_prefix(names.values()):
        names = {name: x.removeprefix(prefix) for name, x in names.items()}
        if (note := _note(prefix, "stands before every name and is left out")) not in notes:
            notes.append(note)
    if not any(name.startswith("model.") for name in names.values()):
        longer = {n: x if x.startswith("lm_head.") else f"model.{x}" for n, x in names.items()}
        if len(needed & set(longer.values())) > len(needed & set(names.values())):
            names = longer
            notes.append(_note("model.", "stands before no name and is added"))
    if len(needed & set(names.values())) > len(present) and len(set(names.values())) == len(names):
        tensors = {x: dataclasses.replace(source.tensors[n], name=x) for n, x in names.items()}
        return dataclasses.replace(source, tensors=MappingProxyType(tensors)), notes
    return source, list(_partly_wrapped(source.tensors, needed - present))


def _shared_prefix(names: Collection[str]) -> str | None:
    for prefix in _PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return None


def _note(part: str, detail: str) -> Finding:
    return Finding(Severity.NOTE, "names", f"'{part}'", detail)


def _partly_wrapped(tensors: Mapping[str, SourceTensor], missing: set[str]) -> Iterator[Finding]:
    for prefix in _PREFIXES:
        if count := sum(f"{prefix}{name}" in tensors for name in missing):
            detail = (
                f"{count} of the {len(missing)} tensors that are missing have names that begin so, "
                "other tensors do not: save the model inside alone, by its own save_pretrained()"
            )
            yield Finding(Severity.ERROR, "names", f"'{prefix}'", detail)


def _adapted(tensors: Mapping[str, SourceTensor]) -> Iterator[Refusal]:
    if lora := [name for name in tensors if ".lora_" in name or ".base_layer." in name]:
        yield (
            f"it holds LoRA layers that were not merged ({len(lora)} tensors, such as "
            f"{lora[0][:200]})",
            "merge them: peft's merge_and_unload(), then save_pretrained().",
        )


def _placeholders(tensors: Mapping[str, SourceTensor]) -> Iterator[Refusal]:
    weights = [tensor for name, tensor in tensors.items() if name.endswith(".weight")]
    empty = [tensor for tensor in weights if tensor.shape == (0,)]
    if len(empty) * 2 > len(weights):
        yield (
            f"{len(empty)} of its {len(weights)} weights are empty: placeholders of DeepSpeed's "
            "ZeRO-3, whose values are in the trainer's state",
            "run zero_to_fp32.py of the checkpoint, or save with "
            "stage3_gather_16bit_weights_on_model_save.",
        )


def _experts(hf: HFConfig, tensors: Mapping[str, SourceTensor]) -> Iterator[Refusal]:
    experts = [name for name in tensors if re.search(r"\.experts\.\d+\.", name)]
    if experts and not any(hf.has(key) for key in _EXPERT_KEYS):
        yield (
            f"its weights are a mixture of experts ({len(experts)} tensors, such as "
            f"{experts[0][:200]}), and config.json knows none",
            "give the model's own config.json; a mixture also needs a plugin that converts it.",
        )


def _quantized(hf: HFConfig, tensors: Mapping[str, SourceTensor]) -> Iterator[Refusal]:
    """Yield what quantized the weights, if they are."""
    methods = [hf.get(f"{key}.quant_method") or "" for key in BLOCKS]
    leaves = _Leaves(
        {name.rpartition(".")[2]: name for name in tensors},
        Counter(x.dtype for name, x in tensors.items() if name.endswith(".weight")),
        " ".join(map(str, methods)).lower(),
    )
    for maker, leaf, test in _MAKERS:
        if test(leaves):
            shown = leaves.names.get(leaf, next(iter(leaves.names.values())))
            yield f"it is already quantized, by {maker} (it has {shown[:200]})", UNQUANTIZED
            return
    others = Counter({x: n for x, n in leaves.dtypes.items() if x not in _PLAIN})
    if others.total() * 2 > leaves.dtypes.total():  # a few are no quantization but damage
        code, count = others.most_common(1)[0]
        yield f"it is already quantized: {count} of its weights are {code}", UNQUANTIZED
