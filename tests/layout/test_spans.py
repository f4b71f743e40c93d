"""What is derived from an index map, against naive numpy: sharding and partition."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from naive import EXAMPLES, gather, numbered

from phireg.layout import axes
from phireg.layout.axes import fuse, order, pad, parts, replicable, src, tied, ungroup
from phireg.layout.spans import (
    Axis,
    LayoutError,
    Part,
    Span,
    check_partition,
    coalesce,
    possible_ranks,
    shard,
    take,
)

TP = st.sampled_from([1, 2, 3, 4, 8])
UNIT = st.sampled_from([1, 2, 3, 5, 7])
SOURCE = st.sampled_from(["a", "b", None])
SPAN = st.builds(Span, SOURCE, st.integers(0, 12), st.integers(0, 6), st.booleans())
SPAN_LISTS = st.lists(SPAN, max_size=8)


def rows_of(spans):
    """Every row by itself, as (source, row, shared); the rows of a fill have no number."""
    return [
        (span.source, None if span.source is None else span.start + i, span.shared)
        for span in spans
        for i in range(span.count)
    ]


@EXAMPLES
@given(SPAN_LISTS)
def test_coalesce_keeps_the_rows_and_joins_all_it_can(spans):
    joined = coalesce(spans)
    assert rows_of(joined) == rows_of(spans)
    assert all(span.count for span in joined)
    for left, right in pairwise(joined):
        alike = (left.source, left.shared) == (right.source, right.shared)
        assert not (alike and (left.source is None or left.stop == right.start))


@EXAMPLES
@given(SPAN_LISTS, st.integers(0, 50), st.integers(0, 50))
def test_take_is_a_slice(spans, start, stop):
    assert rows_of(take(spans, start, stop)) == rows_of(spans)[start:stop]


# Sharding


@EXAMPLES
@given(TP, st.lists(st.integers(0, 4), min_size=1, max_size=4), UNIT, st.integers(0, 1))
def test_shard_is_np_split_of_every_part(tp, units, unit, extra):
    """Each part is cut by itself, in whole units; anything else is refused."""
    sizes = {f"p{i}": count * tp * unit + extra * unit for i, count in enumerate(units)}
    data = numbered(**sizes)
    axis = fuse(unit=unit, **{name: src(name, rows) for name, rows in sizes.items()})
    for rank in range(tp):
        if extra and tp > 1:
            with pytest.raises(LayoutError, match="part 'p0'"):
                shard(axis, tp, rank)
            continue
        share = shard(axis, tp, rank)
        expected = [np.split(data[name], tp)[rank] for name in sizes]
        assert gather(share, data).tolist() == np.concatenate(expected).tolist()
        assert [part.length for part in share.parts] == [len(piece) for piece in expected]


@EXAMPLES
@given(tp=TP, kv=st.integers(1, 3), q=st.integers(1, 3), head=UNIT)
def test_grouped_qkv_shards_as_attention_needs_it(tp, kv, q, head):
    """Rank r gets query heads [r * H / tp, ...) and exactly the KV heads those queries use."""
    heads = kv * tp
    rows = heads * (q + 2) * head
    data = numbered(x=rows)
    axis = ungroup(src("x", rows), groups=heads, unit=head, q=q, k=1, v=1)
    grouped = data["x"].reshape(heads, q + 2, head)
    for rank in range(tp):
        mine = grouped[rank * kv : (rank + 1) * kv]
        expected = [mine[:, :q].reshape(-1), mine[:, q].reshape(-1), mine[:, q + 1].reshape(-1)]
        assert gather(shard(axis, tp, rank), data).tolist() == np.concatenate(expected).tolist()


@EXAMPLES
@given(tp=st.sampled_from([2, 4, 8]), kv=st.sampled_from([1, 2, 3, 4, 5]), head=UNIT)
def test_replicated_kv_heads(tp, kv, head):
    """With fewer KV heads than ranks, tp / kv neighboring ranks hold the same one."""
    data = numbered(k=kv * head)
    axis = replicable(fuse(unit=head, k=src("k", kv * head)), "k")
    if kv % tp and tp % kv:
        assert not possible_ranks(axis.parts[0], tp)
        with pytest.raises(LayoutError, match="part 'k'"):
            shard(axis, tp, 0)
        return
    # With kv >= tp this is the plain split, with fewer every head tp / kv times in a row.
    whole = data["k"].reshape(kv, head)
    spread = np.repeat(whole, max(tp // kv, 1), axis=0).reshape(tp, -1)
    owned = []
    for rank in range(tp):
        share = shard(axis, tp, rank)
        assert gather(share, data).tolist() == spread[rank].tolist()
        owned += [row for _, row, shared in rows_of(share.spans) if not shared]
    assert owned == list(range(kv * head)), "each row is owned once, whatever its copies"


@EXAMPLES
@given(tp=TP, rows=st.integers(1, 40), unit=st.sampled_from([1, 2, 3]))
def test_pad_is_np_pad_and_split(tp, rows, unit):
    """A vocabulary: every rank gets the same number of rows, in whole units, zeros at the end."""
    data = numbered(x=rows)
    axis = pad(src("x", rows, unit=unit))
    step = tp * unit
    padded = np.pad(data["x"], (0, -rows % step))
    for rank in range(tp):
        share = shard(axis, tp, rank)
        assert gather(share, data).tolist() == np.split(padded, tp)[rank].tolist()
        assert not any(part.padded for part in share.parts), "a shard is not padded again"


@EXAMPLES
@given(rows=st.integers(0, 60), unit=UNIT, tp=TP, may_repeat=st.booleans())
def test_possible_ranks_is_when_shard_works(rows, unit, tp, may_repeat):
    axis = Axis((Part("p", (Span("x", 0, rows),), unit, may_repeat),), (("x", rows),))
    whole, heads = rows % unit == 0, rows // unit
    expected = whole and (heads % tp == 0 or (may_repeat and tp % heads == 0))
    assert possible_ranks(axis.parts[0], tp) == expected
    if expected:
        assert {shard(axis, tp, rank).length for rank in range(tp)} == {
            rows // tp if heads % tp == 0 else unit
        }
    else:
        with pytest.raises(LayoutError, match="part 'p'"):
            shard(axis, tp, 0)


def test_shard_errors_name_the_part_and_the_amounts():
    with pytest.raises(LayoutError, match=r"part 'k': 10 .*64 .* 4 ranks"):
        shard(fuse(unit=64, q=src("q", 2560), k=src("k", 640)), 4, 0)
    for rank in (-1, 2):
        with pytest.raises(LayoutError, match=f"rank {rank} .* 2 ranks"):
            shard(src("x", 8), 2, rank)


def test_a_shard_names_only_the_sources_it_reads():
    axis = parts(fuse(a=src("a", 4), b=src("b", 4)), rows=8)
    assert shard(axis, 2, 0).sources == (("a", 4),)
    assert shard(axis, 2, 1).sources == (("b", 4),)
    assert shard(pad(src("v", 1)), 2, 1).sources == (), "only zero rows"


# Partition


@st.composite
def models(draw):
    """A small model's modules, awkwardly sized, with the ways their rows may go."""
    tp = draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([1, 3, 5]))
    kv = draw(st.sampled_from([1, 2, 4]))
    q = draw(st.integers(1, 2)) * (1 if kv % tp == 0 else tp)
    inner = draw(st.integers(1, 5)) * tp
    vocab = draw(st.integers(1, 19))
    sources = {"embed": vocab, "gate_up": 2 * inner}
    if draw(st.booleans()):
        sources["qkv"] = kv * (q + 2) * head
        qkv = ungroup(src("qkv", sources["qkv"]), groups=kv, unit=head, q=q, k=1, v=1)
    else:
        sources |= {"q": kv * q * head, "k": kv * head, "v": kv * head}
        qkv = fuse(unit=head, **{name: src(name, sources[name]) for name in "qkv"})
    targets = {
        "qkv": replicable(qkv, "k", "v"),
        "fc": order(parts(src("gate_up", 2 * inner), gate=inner, up=inner), "up", "gate"),
        "head": pad(tied(src("embed", vocab))),
    }
    return tp, sources, targets, src("embed", vocab)


def shards(tp, targets, table):
    """Every rank's tensors; the table is whole on all, and rank 0's is the one that owns it."""
    ranks = {
        f"{name}@{rank}": shard(axis, tp, rank)
        for name, axis in targets.items()
        for rank in range(tp)
    }
    return ranks | {f"table@{rank}": tied(table) if rank else table for rank in range(tp)}


@EXAMPLES
@given(models())
def test_the_shards_hold_every_source_row_once(model):
    tp, sources, targets, table = model
    data = numbered(**sources)
    whole = shards(tp, targets, table)
    assert check_partition(whole, sources) == []
    rebuilt = {name: np.full(rows, -1) for name, rows in sources.items()}
    for axis in whole.values():
        written, position = gather(axis, data), 0
        for span in axis.spans:
            if span.source is not None and not span.shared:
                rows = written[position : position + span.count]
                rebuilt[span.source][span.start : span.stop] = rows
            position += span.count
    for name, rows in data.items():
        assert rebuilt[name].tolist() == rows.tolist()


@EXAMPLES
@given(models(), st.data())
def test_a_missing_shard_is_a_hole_named_by_range(model, data):
    tp, sources, targets, table = model
    whole = shards(tp, targets, table)
    owned = {
        name: [row[:2] for row in rows_of(axis.spans) if row[0] is not None and not row[2]]
        for name, axis in whole.items()
    }
    lost = data.draw(st.sampled_from([name for name, rows in owned.items() if rows]))
    left = {name: axis for name, axis in whole.items() if name != lost}
    problems = check_partition(left, sources)
    holes = {
        (source, row)
        for line in problems
        for first, stop, source in re.findall(r"rows (\d+) to (\d+) of (\w+) .* nowhere", line)
        for row in range(int(first), int(stop))
    }
    assert holes == set(owned[lost])


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 14), st.integers(1, 8), st.booleans()), max_size=7),
    st.integers(0, 20),
)
@example([(0, 4, False), (3, 2, False)], 5).via("one row in common")
@example([(0, 8, False), (1, 2, False), (5, 2, False)], 8).via("two spans within one")
@example([(0, 3, False), (0, 3, True), (4, 1, False)], 5).via("a hole, and a row said to be shared")
def test_check_partition_counts_like_numpy(pieces, rows):
    """Random spans over one source: holes, doubled rows and rows outside, all by range."""
    targets = {
        f"t{i}": Axis((Part("p", (Span("x", start, count, shared),)),), ())
        for i, (start, count, shared) in enumerate(pieces)
    }
    uses, outside = np.zeros(rows, dtype=int), set()
    for i, (start, count, shared) in enumerate(pieces):
        if start + count > rows:
            outside.add(f"t{i} reads rows {start} to {start + count} of x, which has {rows}")
        elif not shared:
            uses[start : start + count] += 1
    problems = check_partition(targets, {"x": rows})
    reported = {"nowhere": set(), "twice": set()}
    rest = set()
    for line in problems:
        match = re.match(r"rows (\d+) to (\d+) of x are used (nowhere|twice)", line)
        if match:
            reported[match[3]] |= set(range(int(match[1]), int(match[2])))
        else:
            rest.add(line)
    assert reported["nowhere"] == set(np.flatnonzero(uses == 0).tolist())
    assert reported["twice"] == set(np.flatnonzero(uses > 1).tolist())
    assert rest == outside
    assert len(problems) == len(set(problems))


def test_problems_name_the_targets():
    targets = {"fc": src("x", 6), "other": axes.select(parts(src("x", 6), a=4, b=2), "b")}
    (problem,) = check_partition(targets, {"x": 6})
    assert "4 to 6 of x" in problem and "fc and other" in problem
    absent, unused = check_partition({"fc": src("y", 2)}, {"x": 3})
    assert absent.startswith("fc reads y,") and "0 to 3 of x" in unused
    # Rows that are only tied have no owner.
    (problem,) = check_partition({"lm_head": tied(src("embed", 5))}, {"embed": 5})
    assert "0 to 5 of embed" in problem


def test_input_features_shard_like_rows():
    """ROW: the columns of head h go with head h."""
    data = {"": np.arange(12)}
    halves = [gather(shard(axes.columns(12, unit=3), 2, rank), data).tolist() for rank in range(2)]
    assert halves == [list(range(6)), list(range(6, 12))]
