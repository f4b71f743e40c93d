"""Compare a checkpoint and its plan with what the source's own class reads from the directory.

Config and bytes are compared with the plan, which has decided how the source is read. Here that
decision is compared: transformers' loader chooses the files, ties the head, and knows the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from phireg.files.regular import listed
from phireg.planning.model import Plan
from phireg.reader.architectures import LONG_FACTORS, SHORT_FACTORS
from phireg.reader.spec import ModelSpec
from phireg.reference.load import Parameters, Reference
from phireg.verification.result import Outcome, Problem, shown

_ROPE = ("rope_parameters", "rope_scaling")
"""The blocks of rope settings in transformers 5 and 4."""


def compare_reading(
    config: Mapping[str, Any], spec: ModelSpec, plan: Plan, reference: Reference
) -> Outcome:
    """Compare files, head and settings; ``spec`` is the meaning of the checkpoint's ``config``."""
    rows = list(_rows(config, spec, reference))
    parameters = reference.parameters
    problems = [*_files(plan, parameters), *_head(plan, parameters)]
    problems += [
        Problem(
            f"config.json: {key}",
            f"is {shown(value, expected)}; the source's {type(reference.model).__name__} computes "
            f"with {shown(expected, value)} ({source})",
            part="config",
        )
        for key, value, source, expected in rows
        if not _equal(value, expected)
    ]
    head = "the embedding" if parameters.tied else "of its own"
    summary = (
        f"{parameters.weights.name}; lm_head is {head}; {len(rows)} settings of the model class"
    )
    return Outcome(summary, problems, parameters.notes)


def _files(plan: Plan, parameters: Parameters) -> Iterator[Problem]:
    planned = {file.name for file in plan.source.files}
    loaded = {file.name for file in parameters.weights.files}
    if planned != loaded:
        yield Problem(
            parameters.weights.name,
            f"is what transformers loads ({listed(sorted(loaded))}); the checkpoint was compared "
            f"with {listed(sorted(planned))}",
        )


def _head(plan: Plan, parameters: Parameters) -> Iterator[Problem]:
    """Compare which source tensors became the embedding and the head."""
    embedding, head = (
        _sources(plan, f"{n}.weight") for n in ("transformer.vocab_embedding", "lm_head")
    )
    if not head or (embedding == head) == parameters.tied or parameters.ends_are_equal():
        return
    taken = "the embedding" if embedding == head else "a head of its own"
    read = "the embedding" if parameters.tied else "a head of its own"
    yield Problem(
        "lm_head.weight",
        f"is {taken} in the plan; transformers reads {read} (tie_word_embeddings and the files)",
        part="lm_head",
    )


def _sources(plan: Plan, name: str) -> set[str]:
    return {source for output in plan.outputs if output.name == name for source in output.sources}


Row = tuple[str, Any, str, Any]
"""A key of the checkpoint's config.json, its value, the source's key, and what its class reads."""


def _rows(config: Mapping[str, Any], spec: ModelSpec, reference: Reference) -> Iterator[Row]:
    """Yield every setting that the source's class has, under the names that classes use."""
    theirs, rope = reference.model.config, spec.rope
    settings: dict[str, tuple[Any, tuple[str, ...]]] = {
        "hidden_size": (spec.hidden_size, ("hidden_size",)),
        "num_hidden_layers": (spec.num_layers, ("num_hidden_layers",)),
        "num_attention_heads": (spec.num_heads, ("num_attention_heads",)),
        "num_key_value_heads": (spec.num_kv_heads, ("num_key_value_heads",)),
        "head_size": (spec.head_size, ("head_dim",)),
        "vocab_size": (spec.vocab_size, ("vocab_size",)),
        "intermediate_size": (
            spec.intermediate_size,
            ("intermediate_size", "ff_intermediate_size"),
        ),
        "max_position_embeddings": (spec.max_position_embeddings, ("max_position_embeddings",)),
        # As stated: for one architecture the reader computes with a constant whatever it is.
        "norm_epsilon": (
            config.get("norm_epsilon", spec.norm_epsilon),
            ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
        ),
        "rotary_base": (rope.base, (*_in_rope("rope_theta"), "rope_theta", "rope_embedding_base")),
        "gegelu_limit": (spec.gegelu_limit, ("gegelu_limit",)),
        "mup_embedding_multiplier": (spec.embedding_multiplier, ("mup_embedding_multiplier",)),
        "mup_width_multiplier": (spec.logits_divisor, ("mup_width_multiplier",)),
        SHORT_FACTORS: (rope.short and list(rope.short), _in_rope("short_factor")),
        LONG_FACTORS: (rope.long and list(rope.long), _in_rope("long_factor")),
    }
    if rope.short is not None:
        name = "original_max_position_embeddings"
        settings[name] = rope.original, (*_in_rope(name), name)
    for key, (value, names) in settings.items():
        if (setting := _read(theirs, names)) is not None:
            yield key, value, *setting
        elif value is not None and key in (SHORT_FACTORS, LONG_FACTORS):
            yield key, value, "rope settings", None
    for module in reference.model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if frequencies is not None:
            ours, rotated = (f"{n} rotated dimensions" for n in (rope.dim, 2 * len(frequencies)))
            yield "rotary_pct", ours, "partial_rotary_factor", rotated
            scale = getattr(module, "attention_scaling", None)
            if scale is not None:
                stated = "rope factor, attention_factor and lengths"
                yield "the scale of cos and sin", rope.short_mscale, stated, float(scale)
            break


def _in_rope(key: str) -> tuple[str, ...]:
    return tuple(f"{block}.{key}" for block in _ROPE)


def _read(config: Any, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """Return the first of several dotted settings that a transformers config has, with its name."""
    for name in names:
        block, _, key = name.rpartition(".")
        if block:
            values = getattr(config, block, None)
            value = values.get(key) if isinstance(values, Mapping) else None
        else:
            value = getattr(config, key, None)
        if value is not None:
            return name, value
    return None


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)
