"""config.json against the one that the plan of the source would write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phireg.reader.architectures import READ, with_defaults
from phireg.reader.schemes import RAW, is_excluded
from phireg.verification.result import Problem

_SAME_FUNCTION = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""TensorRT-LLM's names of the tanh approximation."""

_LOGITS_DTYPES = ("float32", "float16")
"""A producer may choose in which of these an engine returns its logits."""

_EXCLUDED = "exclude_modules"

_ATTENTION = ("rotary", "rope", "position", "longrope", "blocksparse", "dense_attention")
_PARTS = {"gegelu_limit": "mlp", "hidden_act": "mlp", "mup_embedding_multiplier": "embedding"}


def compare_configs(
    found: Mapping[str, Any], planned: Mapping[str, Any]
) -> tuple[list[Problem], list[str]]:
    """Problems and notes.

    Args:
        found: the checkpoint's config.json.
        planned: what this phireg would write. It holds a superset of keys, for readers old and
            new, so one that is absent is a problem only where the reader would then compute
            something else.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    effective = with_defaults(found)
    for key, wanted in planned.items():
        if isinstance(wanted, Mapping):
            problems += _block(key, found.get(key), wanted)
            if key == "quantization":
                excluded, more = _excluded(found.get(key), wanted, planned)
                problems += excluded
                notes += more
        elif key not in found or (found[key] is None and wanted is not None):
            if _equal(effective.get(key), wanted):
                notes.append(f"{key} is absent; the reader's default is what is wanted")
            elif key in READ:
                problems.append(_problem(key, "is absent", wanted))
            else:
                notes.append(f"{key} is absent; only some releases read it")
        elif not _equal(found[key], wanted):
            if key == "logits_dtype" and found[key] in _LOGITS_DTYPES:
                notes.append(f"{key} is {found[key]!r}; phireg writes {wanted!r}")
            elif wanted in _SAME_FUNCTION and found[key] in _SAME_FUNCTION:
                notes.append(f"{key} is {found[key]!r}, the reader's other name of {wanted!r}")
            else:
                problems.append(_problem(key, _differs(key, found[key], planned), wanted))
    for key in found.keys() - planned.keys():
        if key in READ and found[key] is not None:
            problems.append(
                Problem(
                    f"config.json: {key}",
                    f"is {_shown(found[key], None)}; the source calls for no such key, and the "
                    "reader acts on it",
                    part=_part(key),
                )
            )
        elif key not in READ:
            notes.append(f"{key} is there, and the reader does not look at it")
    return problems, notes


def _block(name: str, found: Any, wanted: Mapping[str, Any]) -> Iterator[Problem]:
    found = found if isinstance(found, Mapping) else {}
    for key, value in wanted.items():
        if key == _EXCLUDED:
            continue
        default = 1 if name == "mapping" else None
        got = found.get(key, default)
        if not _equal(got, value):
            yield _problem(f"{name}.{key}", f"is {got!r}", value)


def _excluded(
    found: Any, wanted: Mapping[str, Any], planned: Mapping[str, Any]
) -> tuple[list[Problem], list[str]]:
    """What a list of excluded modules leaves unquantized; as a list it may be another one."""
    key = f"quantization.{_EXCLUDED}"
    patterns = found.get(_EXCLUDED) if isinstance(found, Mapping) else None
    if _EXCLUDED not in wanted:
        return ([_problem(key, f"is {patterns!r}", None)] if patterns else []), []
    if patterns is None:
        return [], [f"{key} is absent; the reader's default leaves lm_head and the embedding alone"]
    if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
        return [_problem(key, f"is {patterns!r}", wanted[_EXCLUDED])], []
    raw = wanted["quant_algo"] in RAW
    names = list(_quantizable(int(planned["num_hidden_layers"]), raw=raw))
    left, right = (
        {name for name in names if is_excluded(name, of)} for of in (patterns, wanted[_EXCLUDED])
    )
    if left != right:
        name = sorted(left ^ right)[0]
        does = "leaves out" if name in left else "does not leave out"
        return [_problem(key, f"{does} {name}", wanted[_EXCLUDED])], []
    if set(patterns) != set(wanted[_EXCLUDED]):
        return [], [f"{key} is another list; the same modules are quantized"]
    return [], []


def _quantizable(layers: int, *, raw: bool) -> Iterator[str]:
    """Modules that a reader would quantize; the embedding only where its builder does so itself."""
    yield "lm_head"
    if raw:
        yield "transformer.vocab_embedding"
    for layer in range(layers):
        for linear in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"):
            yield f"transformer.layers.{layer}.{linear}"


def _problem(key: str, text: str, wanted: Any) -> Problem:
    return Problem(
        f"config.json: {key}",
        f"{text}; the source calls for {_shown(wanted, None)}",
        part=_part(key),
    )


def _differs(key: str, found: Any, planned: Mapping[str, Any]) -> str:
    other = {"short": "long", "long": "short"}
    twin = "_".join(other.get(word, word) for word in key.split("_"))
    if twin != key and planned.get(twin) is not None and _equal(found, planned[twin]):
        return f"is what {twin} should be: the two are exchanged or repeated"
    return f"is {_shown(found, planned[key])}"


def _part(key: str) -> str:
    if key in _PARTS:
        return _PARTS[key]
    return "attention" if key.startswith(_ATTENTION) else "config"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def _shown(value: Any, beside: Any) -> str:
    """A value; of a long list the first items, or the first that differs from ``beside``."""
    if not isinstance(value, list) or len(value) <= 6:
        return repr(value)
    if isinstance(beside, list) and len(beside) == len(value):
        first = next(
            n for n, pair in enumerate(zip(value, beside, strict=True)) if pair[0] != pair[1]
        )
        return f"{value[first]!r} at item {first} (wanted {beside[first]!r})"
    return f"[{', '.join(map(repr, value[:3]))}, ...] ({len(value)} items)"
