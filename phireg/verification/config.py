"""Compare config.json with the one that a conversion of the source would write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phireg.reader.architectures import READ, with_defaults
from phireg.reader.schemes import LINEARS, RAW, Excluded
from phireg.verification.result import Problem, shown

_SAME_FUNCTION = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""TensorRT-LLM's names of the tanh approximation."""

_LOGITS_DTYPES = ("float32", "float16")
"""A producer may choose in which of these an engine returns its logits."""

_EXCLUDED = "exclude_modules"

_ATTENTION = ("rotary", "rope", "position", "longrope", "blocksparse", "dense_attention")
_PARTS = {"gegelu_limit": "mlp", "hidden_act": "mlp", "mup_embedding_multiplier": "embedding"}


def compare_configs(
    config: Mapping[str, Any], planned: Mapping[str, Any]
) -> tuple[list[Problem], list[str]]:
    """Return problems and notes.

    ``planned``, the config.json that phireg would write, has a superset of keys, for readers old
    and new: an absent key is a problem only where the reader's default has another effect.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    effective = with_defaults(config)
    for key, expected in planned.items():
        value = config.get(key)
        if isinstance(expected, Mapping):
            problems += _block(key, value, expected)
            if key == "quantization":
                excluded_problems, excluded_notes = _excluded(value, expected, planned)
                problems += excluded_problems
                notes += excluded_notes
        elif key not in config or (value is None and expected is not None):
            if _equal(effective.get(key), expected):
                notes.append(f"{key} is absent; the reader's default is the same")
            elif key in READ:
                problems.append(_problem(key, "is absent", expected))
            else:
                notes.append(f"{key} is absent; only some releases read it")
        elif not _equal(value, expected):
            if key == "logits_dtype" and value in _LOGITS_DTYPES:
                notes.append(f"{key} is {value!r}; phireg writes {expected!r}")
            elif expected in _SAME_FUNCTION and value in _SAME_FUNCTION:
                notes.append(f"{key} is {value!r}, the reader's other name of {expected!r}")
            else:
                problems.append(_problem(key, _difference(key, value, planned), expected))
    for key in config.keys() - planned.keys():
        if key in READ and config[key] is not None:
            text = (
                f"is {shown(config[key], None)}; the source calls for no such key, and the reader "
                "acts on it"
            )
            problems.append(Problem(f"config.json: {key}", text, part=_part(key)))
        elif key not in READ:
            notes.append(f"{key} is there, and the reader does not look at it")
    return problems, notes


def _block(name: str, block: Any, expected: Mapping[str, Any]) -> Iterator[Problem]:
    block = block if isinstance(block, Mapping) else {}
    default = 1 if name == "mapping" else None
    for key, value in expected.items():
        actual = block.get(key, default)
        if key != _EXCLUDED and not _equal(actual, value):
            yield _problem(f"{name}.{key}", f"is {actual!r}", value)


def _excluded(
    block: Any, expected: Mapping[str, Any], planned: Mapping[str, Any]
) -> tuple[list[Problem], list[str]]:
    """Compare the modules that the lists leave unquantized; the lists themselves may differ."""
    key = f"quantization.{_EXCLUDED}"
    patterns = block.get(_EXCLUDED) if isinstance(block, Mapping) else None
    if _EXCLUDED not in expected:
        return ([_problem(key, f"is {patterns!r}", None)] if patterns else []), []
    planned_patterns = expected[_EXCLUDED]
    if patterns is None:
        return [], [f"{key} is absent; the reader's default leaves lm_head and the embedding alone"]
    if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
        return [_problem(key, f"is {patterns!r}", planned_patterns)], []
    raw = expected["quant_algo"] in RAW
    try:
        excluded, planned_excluded = Excluded(patterns), Excluded(planned_patterns)
    except ValueError as error:
        return [_problem(key, f"has {error}", planned_patterns)], []
    for name in _quantizable(int(planned["num_hidden_layers"]), raw=raw):
        if (name in excluded) != (name in planned_excluded):
            verb = "leaves out" if name in excluded else "does not leave out"
            return [_problem(key, f"{verb} {name}", planned_patterns)], []
    if set(patterns) != set(planned_patterns):
        return [], [f"{key} is another list; the same modules are quantized"]
    return [], []


def _quantizable(layers: int, *, raw: bool) -> Iterator[str]:
    """Yield the modules that a reader would quantize; raw: its builder does so itself."""
    yield "lm_head"
    if raw:
        yield "transformer.vocab_embedding"
    for layer in range(layers):
        for linear in LINEARS:
            yield f"transformer.layers.{layer}.{linear}"


def _problem(key: str, text: str, expected: Any) -> Problem:
    text = f"{text}; the source calls for {shown(expected, None)}"
    return Problem(f"config.json: {key}", text, part=_part(key))


def _difference(key: str, value: Any, planned: Mapping[str, Any]) -> str:
    other = {"short": "long", "long": "short"}
    twin = "_".join(other.get(word, word) for word in key.split("_"))
    if twin != key and planned.get(twin) is not None and _equal(value, planned[twin]):
        return f"is what {twin} should be: the two are exchanged or repeated"
    return f"is {shown(value, planned[key])}"


def _part(key: str) -> str:
    if key in _PARTS:
        return _PARTS[key]
    return "attention" if key.startswith(_ATTENTION) else "config"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)
