"""The order of the work, for unusual outputs: simulated row by row."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phireg.layout.spans import Span
from phireg.planning.model import Output, Rows
from phireg.planning.schedule import schedule
from phireg.source.tensors import SourceTensor

SOURCES = {"a": 7, "b": 5, "c": 3}
# The files' order is not the names' order.
TENSORS = {
    name: SourceTensor(name, "F32", (rows, 2), f"file-{9 - n}", 100 * n)
    for n, (name, rows) in enumerate(SOURCES.items())
}
SHIFT = {name: 100 * n for n, name in enumerate(SOURCES)}


def output(spans, name="x"):
    rows = sum(span.count for span in spans)
    return Output(0, name, "F32", (rows, 2), 0, Rows(tuple(spans)))


@st.composite
def span(draw):
    source = draw(st.sampled_from([*SOURCES, None]))
    if source is None:
        return Span(None, 0, draw(st.integers(1, 3)))
    start = draw(st.integers(0, SOURCES[source] - 1))
    return Span(source, start, draw(st.integers(1, SOURCES[source] - start)))


@st.composite
def ascending(draw):
    """Spans over the sources in their order, no row twice."""
    spans = []
    for source, rows in SOURCES.items():
        cuts = sorted(draw(st.sets(st.integers(0, rows), max_size=6)))
        spans += [Span(source, a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        if draw(st.booleans()):
            spans.append(Span(None, 0, draw(st.integers(1, 2))))
    return spans


def rows_of(spans):
    rows = []
    for s in spans:
        rows += [None if s.source is None else (s.source, s.start + n) for n in range(s.count)]
    return rows


def carry_out(outputs):
    """What the tasks write, and how often each source row is read."""
    written = [[] for _ in outputs]
    reads = Counter()
    owner = {}
    for number, task in enumerate(schedule(outputs, TENSORS)):
        for step in task.steps:
            assert step.count > 0 and step.writes
            rows = [None] * step.count
            if step.source is not None:
                assert step.row >= 0 and step.row + step.count <= SOURCES[step.source.name]
                rows = [(step.source.name, step.row + n) for n in range(step.count)]
                reads.update(rows)
            for write in step.writes:
                assert owner.setdefault(write.output, number) == number
                assert write.row == len(written[write.output])  # front to back, without a hole
                written[write.output] += rows
    return written, reads


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(span(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_output_is_filled_front_to_back(spans):
    written, reads = carry_out([output(s) for s in spans])
    assert written == [rows_of(s) for s in spans]
    assert set(reads) == {row for s in spans for row in rows_of(s) if row is not None}


@settings(max_examples=300, deadline=None)
@given(st.lists(ascending().filter(bool), min_size=1, max_size=5))
def test_rows_are_read_once_when_the_orders_agree(spans):
    written, reads = carry_out([output(s) for s in spans])
    assert written == [rows_of(s) for s in spans]
    assert set(reads.values()) <= {1}


@settings(max_examples=100, deadline=None)
@given(ascending().filter(bool), st.integers(2, 8))
def test_equal_outputs_share_every_read(spans, copies):
    _, reads = carry_out([output(spans)] * copies)
    assert set(reads.values()) <= {1}


RINGS = [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


@pytest.mark.parametrize(
    "outputs",
    [
        [[Span("a", 0, 2), Span("a", 4, 3)], [Span("a", 4, 3), Span("a", 0, 2)]],
        [[Span(name, 0, SOURCES[name]) for name in ring] for ring in RINGS],
        [[Span("a", 1, 2), Span("a", 1, 2), Span("b", 0, 1), Span("a", 0, 3)], [Span("a", 1, 1)]],
    ],
    ids=["opposite", "ring", "repeated"],
)
def test_orders_that_exclude_each_other(outputs):
    written, reads = carry_out([output(spans) for spans in outputs])
    assert written == [rows_of(spans) for spans in outputs]
    assert max(reads.values()) >= 2  # a range that cannot wait for all is read again


def test_tasks_share_no_source_and_follow_the_files():
    outputs = [output([Span(name, 0, 1)]) for name in SOURCES]
    tasks = schedule(outputs, TENSORS)
    assert [task.steps[0].source.name for task in tasks] == ["c", "b", "a"]
    joined = [*outputs, output([Span("a", 2, 1), Span("c", 0, 1)])]
    assert len(schedule(joined, TENSORS)) == 2
    assert schedule((), TENSORS) == ()
    (task,) = schedule([output([Span(None, 0, 4)])], TENSORS)
    (step,) = task.steps
    assert (step.source, step.count, len(step.writes)) == (None, 4, 1)
