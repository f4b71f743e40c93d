"""Index maps read the slow way: gather numbered rows, span by span."""

import numpy as np
from hypothesis import settings

EXAMPLES = settings(max_examples=60, deadline=None)


def numbered(**rows):
    """A row number for every row of every source; none is zero, so that fill shows."""
    return {
        name: np.arange(count) + 1 + 10_000 * index
        for index, (name, count) in enumerate(rows.items())
    }


def gather(axis, data):
    """The target that ``axis`` describes, from arrays of the sources' rows."""
    pieces = [np.zeros(0, dtype=int)]
    for part in axis.parts:
        for span in part.spans:
            rows = np.arange(span.start, span.start + span.count)
            pieces.append(
                np.zeros(span.count, dtype=int) if span.source is None else data[span.source][rows]
            )
    return np.concatenate(pieces)
