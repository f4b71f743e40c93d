"""The checkpoint that ``convert`` would write, read from the source as an executor asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from phireg.config.hf import HFConfig
from phireg.conversion.stream import assemble
from phireg.dtypes import as_torch
from phireg.executor.model import Source
from phireg.files.json import read_json_object
from phireg.planning.build import build_plan
from phireg.planning.model import Output, Plan
from phireg.source.model import Reader


def unquantized_plan(plan: Plan) -> Plan:
    """The plan of the same conversion without quantization."""
    hf = HFConfig(read_json_object(plan.source.directory / "config.json"))
    options = dataclasses.replace(plan.options, qformat=None, kv_cache_dtype=None)
    return build_plan(plan.chosen, hf, plan.source, options, plan.model_dir)


def rank_sources(plan: Plan, reader: Reader) -> list[Source]:
    """For every rank a function from a tensor's name to the tensor, as the plan would write it."""
    ranks: list[dict[str, Output]] = [{} for _ in range(plan.options.tp_size)]
    for output in plan.outputs:
        ranks[output.rank][output.name] = output
    return [_source(plan, outputs, reader) for outputs in ranks]


def _source(plan: Plan, outputs: dict[str, Output], reader: Reader) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        output = outputs[name]
        bits = assemble(plan, output, reader)
        tensor: Tensor = as_torch(bits, output.dtype)
        return tensor.reshape(output.shape)

    return read
