"""Scales ride along: converting and dequantizing may be done in either order."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phireg.layout.axes import columns, fuse, order, pad, parts, src, ungroup
from phireg.layout.rules import Linear, Policy
from phireg.layout.spans import LayoutError, shard
from phireg.planning.quantized import axes_of

COLUMN, ROW = Policy.COLUMN, Policy.ROW
SHARDED = {COLUMN: "rows", ROW: "cols"}


def gather(axis, arrays, along):
    """Rows (or columns) of the sources, span by span."""
    shape = list(next(iter(arrays.values())).shape)
    pieces = []
    for span in axis.spans:
        shape[along] = span.count
        taken = range(span.start, span.stop)
        pieces.append(
            np.zeros(shape) if span.source is None else arrays[span.source].take(taken, along)
        )
    return np.concatenate(pieces, along)


def convert(rule, companion, tensors, tp, rank):
    """One companion of every source module, as ``rank`` of ``tp`` gets it."""
    (rows,) = rule.weight
    largest, count = max(rows.sources, key=lambda source: source[1])
    one = tensors[largest]
    axes = axes_of(companion, one.shape, count)
    maps = {"rows": rows, "cols": rule.cols}
    maps[SHARDED[rule.policy]] = shard(maps[SHARDED[rule.policy]], tp, rank)
    if "rows" in axes:
        tensors = {"": gather(maps["rows"], tensors, axes.index("rows"))}
    else:  # equal in all sources that are fused, so any one serves
        tensors = {"": one}
    return gather(maps["cols"], tensors, axes.index("cols")) if "cols" in axes else tensors[""]


def dequantize(module):
    """y = (W * s) (x * p): the weight that acts on unscaled input."""
    scale = module["weights_scaling_factor"]
    by_row = scale[:, None] if len(scale) == len(module["weight"]) and len(scale) > 1 else scale
    return module["weight"] * by_row * module["prequant_scaling_factor"]


@st.composite
def linears(draw):
    """A linear of every shape of mapping, with the rows of its source modules."""
    tp = draw(st.sampled_from([1, 2]))
    policy = draw(st.sampled_from([COLUMN, ROW]))
    head, kv, q = (
        draw(st.sampled_from([1, 3, 5])),
        draw(st.integers(1, 2)) * tp,
        draw(st.integers(1, 3)),
    )
    inner = draw(st.integers(1, 4)) * tp
    kind = draw(st.sampled_from(["plain", "grouped", "swapped", "fused", "padded"]))
    if kind == "grouped":
        sources = {"a": kv * (q + 2) * head}
        rows = ungroup(src("a", sources["a"]), groups=kv, unit=head, q=q, k=1, v=1)
    elif kind == "swapped":
        sources = {"a": 2 * inner}
        rows = order(parts(src("a", 2 * inner), gate=inner, up=inner), "up", "gate")
    elif kind == "fused":
        sources = {"a": kv * q * head, "b": kv * head, "c": kv * head}
        rows = fuse(unit=head, **{name: src(name, count) for name, count in sources.items()})
    elif kind == "padded" and policy is COLUMN:
        sources = {"a": draw(st.integers(2, 9))}
        rows = pad(src("a", sources["a"]))
    else:
        sources = {"a": 2 * inner}
        rows = src("a", 2 * inner)
    cols = tp * draw(st.integers(1, 3)) * head
    return tp, sources, Linear("fc", rows, columns(cols, unit=head), policy)


@settings(max_examples=60, deadline=None)
@given(linear=linears(), per_row=st.booleans(), seed=st.integers(0, 2**16))
def test_converting_and_dequantizing_commute(linear, per_row, seed):
    tp, sources, rule = linear
    random = np.random.default_rng(seed)
    cols = rule.cols.length
    # Fused sources share what does not follow their rows: the smoother, and a per-tensor scale.
    smoother, single = random.uniform(0.5, 2, cols), random.uniform(0.5, 2, 1)
    modules = {
        name: {
            "weight": random.integers(-127, 128, (rows, cols)).astype(float),
            "weights_scaling_factor": random.uniform(0.5, 2, rows) if per_row else single,
            "prequant_scaling_factor": smoother,
        }
        for name, rows in sources.items()
    }
    assume(per_row or max(sources.values()) > 1)  # of one row, both kinds are the same
    dequantized = {name: dequantize(module) for name, module in modules.items()}
    for rank in range(tp):
        converted = {
            companion: convert(
                rule, companion, {n: m[companion] for n, m in modules.items()}, tp, rank
            )
            for companion in ("weight", "weights_scaling_factor", "prequant_scaling_factor")
        }
        expected = convert(rule, "weight", dequantized, tp, rank)
        np.testing.assert_array_equal(dequantize(converted), expected)


@settings(max_examples=60, deadline=None)
@given(linear=linears(), seed=st.integers(0, 2**16))
def test_ranks_together_compute_the_source_linear(linear, seed):
    """COLUMN outputs stand side by side (part by part), ROW outputs are added up."""
    tp, sources, rule = linear
    random = np.random.default_rng(seed)
    cols = rule.cols.length
    weights = {n: random.integers(-9, 10, (rows, cols)) for n, rows in sources.items()}
    x = random.integers(-9, 10, cols)
    (axis,) = rule.weight
    whole = gather(axis, weights, 0) @ x
    ranks = [convert(rule, "weight", weights, tp, rank) for rank in range(tp)]
    if rule.policy is ROW:
        parts_of_x = np.split(x, tp)
        total = sum(w @ piece for w, piece in zip(ranks, parts_of_x, strict=True))
        assert total.tolist() == whole.tolist()
        return
    outputs = [w @ x for w in ranks]
    rebuilt, done = [], [0] * tp
    for part in axis.parts:
        share = -(-part.length // tp)
        together = [out[at : at + share] for out, at in zip(outputs, done, strict=True)]
        done = [at + share for at in done]
        rebuilt.append(np.concatenate(together)[: part.length])
    assert np.concatenate(rebuilt).tolist() == whole.tolist()


def test_axes_of_a_scale_depend_on_its_shape():
    name = "weights_scaling_factor"
    assert axes_of(name, (6,), 6) == ("rows",)
    assert axes_of(name, (1,), 6) == axes_of(name, (), 6) == ()
    assert (axes_of(name, (1,), 1), axes_of(name, (), 1)) == (("rows",), ())
    with pytest.raises(LayoutError, match="zeros"):
        axes_of("zeros", (6,), 6)
