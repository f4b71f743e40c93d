"""Files: of bounded size with an index, named as transformers names them, and their headers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from phireg.files.safetensors import encode_header
from phireg.planning.model import Output

MOST_FILES = 500
"""Files are written side by side, and a process may have about a thousand open."""

PT = {"format": "pt"}
"""What readers of Hugging Face directories want to find in a file's header."""

_WHOLE = "model.safetensors"
INDEX_FILE = f"{_WHOLE}.index.json"


def in_shards(
    outputs: Sequence[Output], max_size: int
) -> tuple[tuple[Output, ...], tuple[str, ...]]:
    """Fill files with outputs up to ``max_size`` bytes; return the outputs and the files' names."""
    numbered: list[Output] = []
    number = size = 0
    for output in outputs:
        if size and size + output.nbytes > max_size:
            number, size = number + 1, 0
        size += output.nbytes
        numbered.append(dataclasses.replace(output, rank=number))
    if number == 0:
        return tuple(numbered), (_WHOLE,)
    names = (f"model-{n:05}-of-{number + 1:05}.safetensors" for n in range(1, number + 2))
    return tuple(numbered), tuple(names)


def shard_index(outputs: Sequence[Output], files: Sequence[str]) -> dict[str, Any]:
    """Return the index of several files."""
    return {
        "metadata": {"total_size": sum(output.nbytes for output in outputs)},
        "weight_map": {output.name: files[output.rank] for output in outputs},
    }


def placed(
    outputs: Sequence[Output], count: int, metadata: Mapping[str, str] | None
) -> tuple[tuple[bytes, ...], tuple[Output, ...]]:
    """Return the headers of the files, and the outputs with their places in them."""
    headers = []
    laid: list[Output] = []
    for rank in range(count):
        own = [output for output in outputs if output.rank == rank]
        header, entries = encode_header([(o.name, o.dtype, o.shape) for o in own], metadata)
        headers.append(header)
        laid += [dataclasses.replace(o, offset=entries[o.name].start) for o in own]
    return tuple(headers), tuple(laid)
