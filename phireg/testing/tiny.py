"""Tiny source checkpoints whose values hide no mistake."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.errors import PluginError
from phireg.family import Family

if TYPE_CHECKING:
    from torch import Tensor

_SCORES = re.compile(r"(^|[._])(q|k|qk|qkv|query|key|query_key_value)_proj\b|Wqkv|query_key_value")
"""Modules that make queries and keys, whose rows decide where attention looks."""

_BOOST = 3.0
_NO_WEIGHT_DEPENDS_ON_THEM = ("auto_map", "rope_scaling", "rope_parameters")


def tiny_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as a whole config.json: architecture and model type are the family's first ones.

    What ``config`` itself says about them is kept.
    """
    named: dict[str, Any] = {"architectures": [family.architectures[0]]}
    if family.model_types:
        named["model_type"] = family.model_types[0]
    return {**named, "torch_dtype": "float32", **config}


def write_tiny_model(
    family: Family,
    config: Mapping[str, Any],
    directory: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random checkpoint of the family's own source model, as transformers saves it.

    Tensor names and shapes are those of the model class that the source is run with (transformers'
    or ``Family.reference``), so they are evidence that the family's rules know the source. The
    values let mistakes show: norms lie around one and no two are alike, biases are not zero, and
    queries and keys are large enough for attention to prefer some tokens to others. Sizes are the
    caller's part: an odd vocabulary, KV heads that are neither one nor all, an intermediate size
    that is not a multiple of the hidden size, a rope base and an epsilon that are not the defaults.

    Args:
        family: names the model class where transformers has none.
        config: the source config.json; written as it is. ``architectures`` and ``model_type`` may
            be left out.
        directory: created if missing.
        dtype: of the weights, by torch's name.
        seed: of the random values.

    Returns:
        ``directory``.

    Raises:
        PluginError: no model class on this machine makes a model of this config.
    """
    import torch

    values = tiny_config(family, config)
    try:
        model = _model(family, values)
    except Exception as error:  # whatever transformers raises: there is no model to write
        raise PluginError(
            f"family '{family.name}': no source model can be made of the tiny config "
            f"({type(error).__name__}: {error})",
            hint="the config must be one that transformers understands, or the family must name "
            "the class that does: Family(reference='module:class').",
        ) from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter, generator))
    with _without_bars():
        model.to(getattr(torch, dtype)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    return directory


def _model(family: Family, values: Mapping[str, Any]) -> Any:
    """The source's model class with whatever it initialises itself to."""
    kept = {key: value for key, value in values.items() if key not in _NO_WEIGHT_DEPENDS_ON_THEM}
    if family.reference is not None:
        kind: Any = pkgutil.resolve_name(family.reference)
        return kind(kind.config_class(**kept))
    import transformers

    kept.pop("torch_dtype", None)
    config = transformers.AutoConfig.for_model(**kept)
    return transformers.AutoModelForCausalLM.from_config(config)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _values(name: str, parameter: Tensor, generator: Any) -> Tensor:
    import torch

    noise: Tensor = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        return 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
    noise *= parameter.shape[-1] ** -0.5
    return noise * _BOOST if _SCORES.search(name) else noise
