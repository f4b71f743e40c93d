"""What a tensor that differs from the source looks like: the mistake, if it is a known one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.conversion.cast import Bits, cast
from phireg.verification import patterns
from phireg.verification.patterns import Heads, Ranks

Floats = npt.NDArray[np.float64]
Others = Callable[[], Iterable[tuple[str, Ranks]]]
"""Expected tensors of the same shape that may stand here by mistake, by name."""

_ROW_LINEARS = ("attention.dense", "mlp.proj")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a wrong tensor looks like.

    Attributes:
        text: for people.
        hint: what may mend it, if known.
    """

    text: str
    hint: str | None = None


def diagnose(
    name: str,
    dtype: str,
    expected: Ranks,
    found: Ranks,
    model: Heads,
    others: Others = lambda: (),
) -> Diagnosis:
    """Name the mistake that turns ``expected`` into ``found``.

    Args:
        name: the tensor.
        dtype: safetensors code of both.
        expected: each rank's tensor [rows, columns], as bits.
        found: the same; it differs on one rank at least.
        model: how heads and gates lie.
        others: what else may stand here.
    """
    for text, hint, made in _candidates(name, expected, model):
        if _same(made, found):
            return Diagnosis(text, hint)
    if text_or_none := _places(name, expected, found, model):
        return Diagnosis(text_or_none)
    for other, tensors in others():
        if _same(tensors, found):
            return Diagnosis(f"it holds {other}")
    values = [_floats(bits, dtype) for bits in (*expected, *found)]
    wanted, got = values[: len(expected)], values[len(expected) :]
    return _by_value(wanted, got, dtype, expected, found)


def _same(left: Ranks, right: Ranks) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _candidates(name: str, expected: Ranks, model: Heads) -> Iterator[patterns.Candidate]:
    module = name.rpartition(".")[0]
    if module.endswith("attention.qkv"):
        yield from patterns.qkv_candidates(expected, model)
    elif module.endswith("mlp.fc"):
        yield from patterns.fc_candidates(expected, model)
    yield from patterns.transposed(expected)


def _places(name: str, expected: Ranks, found: Ranks, model: Heads) -> str | None:
    """Ranks, heads, rows or columns in the wrong places."""
    if text := patterns.exchanged_ranks(expected, found):
        return text
    module, _, companion = name.rpartition(".")
    joined = module.endswith(_ROW_LINEARS) and companion == "weight"
    if joined:
        wanted, got = (np.concatenate(ranks, axis=1) for ranks in (expected, found))
    elif _replicated(module, companion):
        wanted, got = (
            expected[0],
            next(f for e, f in zip(expected, found, strict=True) if not np.array_equal(e, f)),
        )
    else:
        wanted, got = (np.concatenate(ranks) for ranks in (expected, found))
    if module == "lm_head" and (text := patterns.misplaced_padding(wanted, got)):
        return text
    if module.endswith("attention.qkv"):
        named = patterns.head_name(model, len(expected))
        if text := patterns.moved_units(wanted, got, model.size, named):
            return text
    if wanted.shape[1] > 1 and (text := patterns.moved_units(wanted, got, 1, "row {}".format)):
        return text
    if wanted.shape[1] == 1:  # single elements are alike too often to tell where they came from
        return None
    wanted, got = (np.ascontiguousarray(rows.T) for rows in (wanted, got))
    if module.endswith("attention.dense") and (
        text := patterns.moved_units(wanted, got, model.size, "the columns of head {}".format)
    ):
        return text
    return patterns.moved_units(wanted, got, 1, "column {}".format)


def _replicated(module: str, companion: str) -> bool:
    return (
        "norm" in module
        or module.endswith(("ln_f", "vocab_embedding"))
        or (module.endswith(_ROW_LINEARS) and companion == "bias")
    )


def _by_value(
    expected: list[Floats], found: list[Floats], dtype: str, bits: Ranks, found_bits: Ranks
) -> Diagnosis:
    ranks = len(expected)
    wrong = [r for r in range(ranks) if not np.array_equal(bits[r], found_bits[r])]
    on = (
        ""
        if len(wrong) == ranks
        else f" on rank{'s' if len(wrong) > 1 else ''} " + ", ".join(map(str, wrong))
    )
    wanted, got = (np.concatenate([v[r].ravel() for r in wrong]) for v in (expected, found))
    if not np.isfinite(got).all() and np.isfinite(wanted).all():
        return Diagnosis(f"{int((~np.isfinite(got)).sum())} values are not finite{on}")
    if not got.any():
        return Diagnosis(f"it is all zero{on}: it was dropped")
    if zeroed := _zeroed(expected[wrong[0]], found[wrong[0]]):
        return Diagnosis(f"{zeroed} are zero{on}")
    if scaled := _scaled(wanted, got, ranks, dtype):
        return Diagnosis(scaled + on)
    unequal = sum(int((bits[r] != found_bits[r]).sum()) for r in wrong)
    size = sum(bits[r].size for r in wrong)
    steps = max(int(_steps(bits[r], found_bits[r]).max()) for r in wrong)
    if steps <= 1 and unequal > size / 100:
        return Diagnosis(f"values are rounded in another way than to nearest even{on}")
    for other in ("BF16", "F16"):
        if other != dtype and all(
            np.array_equal(cast(cast(bits[r], dtype, other)[0], other, dtype)[0], found_bits[r])
            for r in wrong
        ):
            return Diagnosis(f"values went through {other}{on}: precision was lost")
    row, column = (int(n[0]) for n in np.nonzero(bits[wrong[0]] != found_bits[wrong[0]]))
    return Diagnosis(
        f"{unequal:,} of {size:,} elements differ{on}, largest difference "
        f"{np.abs(wanted - got).max():.3g}; first at row {row}, column {column}: "
        f"{found[wrong[0]][row, column]:.5g} instead of {expected[wrong[0]][row, column]:.5g}"
    )


def _zeroed(expected: Floats, found: Floats) -> str | None:
    """A rectangle of zeros and nothing else wrong."""
    unequal = expected != found
    if found[unequal].any() or not unequal.any():
        return None
    rows, columns = (np.flatnonzero(unequal.any(axis=axis)) for axis in (1, 0))
    block = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    if found[block].any():
        return None
    where = f"rows {rows[0]}:{rows[-1] + 1}"
    whole = columns[0] == 0 and columns[-1] + 1 == expected.shape[1]
    return where if whole else f"{where}, columns {columns[0]}:{columns[-1] + 1}"


def _scaled(wanted: Floats, got: Floats, ranks: int, dtype: str) -> str | None:
    power = float(wanted @ wanted)
    if not power or len(wanted) < 2:
        return None
    factor = float(got @ wanted) / power
    precision = {"F16": 2**-10, "BF16": 2**-7, "F32": 2**-22}[dtype]
    if np.abs(got - factor * wanted).max() > 2 * precision * abs(factor) * np.abs(wanted).max():
        return None
    if np.abs(got - wanted).max() <= 2 * precision * np.abs(wanted).max():
        return None
    known = {
        1 / ranks: "divided by the number of ranks",
        ranks: "multiplied by the number of ranks",
    }
    for value, text in known.items():
        if ranks > 1 and abs(factor / value - 1) < 1e-3:
            return f"it is {text}; the reader adds it once"
    return f"it is scaled by {factor:.6g}"


def _steps(left: Bits, right: Bits) -> npt.NDArray[np.int64]:
    """Distance in representable values; wrong across zero, where it only gets larger."""
    return np.abs(left.astype(np.int64) - right.astype(np.int64))


def _floats(bits: Bits, dtype: str) -> Floats:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kinds: dict[str, Any] = {"F16": np.float16, "F32": np.float32}
    values: Floats = np.ascontiguousarray(bits).view(kinds[dtype]).astype(np.float64)
    return values
