"""Each constructor of index maps against the numpy code it stands for."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive import EXAMPLES, gather, numbered

from phireg.layout.axes import columns, fuse, order, parts, replicable, select, src, ungroup
from phireg.layout.spans import LayoutError

SIZE = st.integers(1, 23)
UNIT = st.sampled_from([1, 2, 3, 5, 7])


@EXAMPLES
@given(SIZE, SIZE, SIZE)
def test_fuse_concatenates(q, k, v):
    data = numbered(a=q, b=k, c=v)
    axis = fuse(q=src("a", q), k=src("b", k), v=src("c", v))
    assert gather(axis, data).tolist() == np.concatenate([data["a"], data["b"], data["c"]]).tolist()
    assert [part.name for part in axis.parts] == ["q", "k", "v"]
    assert dict(axis.sources) == {"a": q, "b": k, "c": v}


@EXAMPLES
@given(SIZE, SIZE, SIZE)
def test_parts_and_select_split(first, second, third):
    rows = first + second + third
    data = numbered(x=rows)
    axis = parts(src("x", rows), a=first, b=second, c=third)
    assert gather(axis, data).tolist() == data["x"].tolist()
    expected = np.split(data["x"], [first, first + second])
    for name, piece in zip("abc", expected, strict=True):
        chosen = select(axis, name)
        assert gather(chosen, data).tolist() == piece.tolist()
        assert chosen.sources == (("x", rows),), "a part still states its whole source"


@EXAMPLES
@given(groups=st.integers(1, 4), unit=UNIT, heads=st.lists(st.integers(0, 3), min_size=1))
def test_ungroup_is_the_reshape_of_grouped_qkv(groups, unit, heads):
    """Phi-3-small's own code: view (groups, q + 2, head) and slice along the second axis."""
    rows = groups * sum(heads) * unit
    data = numbered(x=rows)
    kinds = {f"kind{index}": count for index, count in enumerate(heads)}
    axis = ungroup(src("x", rows), groups=groups, unit=unit, **kinds)
    grouped = data["x"].reshape(groups, sum(heads), unit) if rows else None
    first = 0
    for part, count in zip(axis.parts, heads, strict=True):
        expected = [] if grouped is None else grouped[:, first : first + count].reshape(-1).tolist()
        assert gather(select(axis, part.name), data).tolist() == expected
        assert part.unit == unit
        first += count


@EXAMPLES
@given(SIZE, SIZE)
def test_constructors_compose_over_several_sources(a, b):
    """A part may lie across the seam of two sources; a reordered one swaps the halves."""
    data = numbered(a=a, b=b)
    whole = np.concatenate([data["a"], data["b"]])
    cut = (a + b) // 2
    axis = parts(fuse(x=src("a", a), y=src("b", b)), low=cut, high=a + b - cut)
    swapped = order(axis, "high", "low")
    assert gather(swapped, data).tolist() == [*whole[cut:], *whole[:cut]]


def test_rows_that_belong_together_stay_together():
    """Twelve rows in units of 4: a fused or split axis may not cut them into threes."""
    x = src("x", 12, unit=4)
    for axis in (fuse(only=x), parts(x, only=12)):
        assert axis.parts[0].unit == 4


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: parts(src("x", 10), a=4, b=5), "x: parts"),
        (lambda: parts(src("x", 10), a=-1, b=11), "x: a"),
        (lambda: order(parts(src("x", 4), a=2, b=2), "a"), "'a'"),
        (lambda: order(parts(src("x", 4), a=2, b=2), "a", "a"), "'a'"),
        (lambda: order(parts(src("x", 4), a=2, b=2), "a", "c"), "'c'"),
        (lambda: select(parts(src("x", 4), a=2, b=2), "c"), "'c'"),
        (lambda: replicable(fuse(q=src("x", 4)), "k"), "'k'"),
        (lambda: ungroup(src("x", 31), groups=2, unit=3, q=3, k=1, v=1), "x: 2 groups"),
        (lambda: ungroup(src("x", 12), groups=2, unit=3, q=-1, k=2, v=1), "x: q"),
        (lambda: fuse(a=src("x", 4), b=src("x", 5)), "x"),
        (lambda: src("x", -1), "x: -1"),
        (lambda: src("x", 4, unit=0), "rows"),
        (lambda: columns(-2), "columns: -2"),
    ],
)
def test_errors_name_the_source_and_the_part(build, named):
    with pytest.raises(LayoutError, match=re.escape(named)):
        build()
