"""The source's model class, built without memory for its weights."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phireg.errors import SourceError
from phireg.family import Family
from phireg.files.json import read_json_object
from phireg.generation.quiet import quiet


def build(family: Family, directory: Path, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
    """A causal language model in evaluation mode; its parameters are on the meta device.

    Buffers (rotary tables) hold their values, on the CPU and in the dtype their class gives them.

    Args:
        family: names the model class where transformers has none.
        directory: the source; its config.json is read, and no code is run from it.
        dtype: of the parameters.

    Returns:
        The model, and what was set differently from config.json, and why.

    Raises:
        SourceError: no model class on this machine reads the config.
    """
    import transformers

    values = read_json_object(directory / "config.json")
    values.pop("quantization_config", None)
    notes = list(_adapted(values)) if family.reference is None else []
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        with quiet(), _without_parameters(dtype):
            if family.reference is None:
                config = transformers.AutoConfig.for_model(**values)
                model = transformers.AutoModelForCausalLM.from_config(config, **{key: dtype})
            else:
                kind: Any = pkgutil.resolve_name(family.reference)
                model = kind._from_config(kind.config_class(**values), **{key: dtype})
    except Exception as error:  # whatever transformers raises, this machine has no reference
        raise SourceError(
            f"the reference model cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    return model.eval(), tuple(notes)


def _adapted(values: dict[str, Any]) -> Iterator[str]:
    """Bring a config to what today's transformers understands; what changes meaning is told."""
    for name in ("auto_map", "_attn_implementation"):
        values.pop(name, None)
    block = values.get("rope_scaling")
    if isinstance(block, dict) and "su" in (block.get("type"), block.get("rope_type")):
        # The first name of long rope, which transformers 5 no longer knows.
        original = values.get("original_max_position_embeddings")
        values["rope_scaling"] = {
            **block,
            "type": "longrope",
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
        }
    if values.get("sliding_window") is not None:
        values["sliding_window"] = None
        yield (
            "the reference attends to all tokens: TensorRT-LLM takes a sliding window at run time, "
            "not from the checkpoint"
        )


@contextmanager
def _without_parameters(dtype: torch.dtype) -> Iterator[None]:
    """Parameters of modules built inside go to the meta device; buffers stay as they are.

    Building the whole model on the meta device would lose its rotary tables, which no file holds.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one keeps its identity
            empty = torch.empty_like(parameter, device="meta", dtype=dtype)
            parameter = nn.Parameter(empty, requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
