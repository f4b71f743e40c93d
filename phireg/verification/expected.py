"""The values that a planned output must hold, assembled from the source."""

from __future__ import annotations

import numpy as np

from phireg.conversion.cast import Bits, cast
from phireg.dtypes import BITS
from phireg.planning.model import Output, Plan, row_bytes
from phireg.source.source import Reader


def kept_columns(block: Bits, output: Output) -> Bits:
    """The columns of whole source rows that an output keeps."""
    if output.columns is None:
        return block
    return np.concatenate([block[:, span.start : span.stop] for span in output.columns], axis=1)


def expected_tensor(plan: Plan, output: Output, reader: Reader) -> Bits:
    """The whole output as the plan makes it, [rows, columns] (one column for a vector)."""
    made = np.zeros(output.matrix, BITS[output.dtype])
    position = 0
    for span in output.rows:
        if span.source is not None:
            source = plan.source.tensors[span.source]
            per_row = row_bytes(source)
            raw = np.empty(span.count * per_row, np.uint8)
            reader.read_into(source, span.start * per_row, raw.data)
            block: Bits = raw.view(BITS[source.dtype]).reshape(span.count, -1)
            if source.dtype != output.dtype:
                block = cast(block, source.dtype, output.dtype)[0]
            made[position : position + span.count] = kept_columns(block, output)
        position += span.count
    return made
