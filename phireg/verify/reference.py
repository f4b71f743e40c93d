"""The source's own model: transformers' class, or the one that the family ships."""

from __future__ import annotations

import json
import logging
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from phireg.errors import SourceError
from phireg.family import Family


class Watcher(Protocol):
    """Told what the reference computes, as it goes. Tensors are [batch, tokens, hidden_size]."""

    def embedded(self, x: Tensor) -> None:
        """The first layer's input."""

    def layer(self, index: int, before: Tensor, attention: Tensor, mlp: Tensor) -> None:
        """A layer's input, and the outputs of its two sub-modules."""

    def hidden(self, index: int, after: Tensor) -> None:
        """A layer's output."""

    def normed(self, u: Tensor) -> None:
        """The final norm's output, which lm_head gets."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A loaded reference.

    Attributes:
        model: a transformers-compatible causal language model.
        notes: what was set differently from the source's config.json, and why.
    """

    model: Any
    notes: tuple[str, ...]

    def logits(self, ids: Tensor, watcher: Watcher) -> Tensor:
        """Float32 logits [batch, tokens, vocab_size] of ``ids`` without a cache."""
        with torch.no_grad(), _watched(self.model, watcher):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()


def load_reference(
    family: Family, directory: Path, *, weights: str, dtype: torch.dtype, device: torch.device
) -> Reference:
    """Load the source model for comparison.

    Its values are rounded to the checkpoint's dtype first, as the conversion rounds them; what then
    differs in the logits is arithmetic, not rounding of weights.

    Args:
        family: names the model class where transformers has none.
        directory: the source.
        weights: the checkpoint's dtype by name.
        dtype: compute dtype.
        device: where to compute.

    Raises:
        SourceError: no model class on this machine reads the source.
    """
    import transformers

    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    values.pop("quantization_config", None)
    notes = list(_adapted(values)) if family.reference is None else []
    try:
        with _quiet(transformers):
            if family.reference is None:
                kind: Any = transformers.AutoModelForCausalLM
                config = transformers.AutoConfig.for_model(**values)
            else:
                kind = pkgutil.resolve_name(family.reference)
                config = kind.config_class(**values)
            key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
            model, info = kind.from_pretrained(
                directory,
                config=config,
                output_loading_info=True,
                **{key: getattr(torch, weights)},
            )
    except Exception as error:  # whatever transformers raises, this machine has no reference
        raise SourceError(
            f"the reference model cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        names = missing or sorted(str(key) for key in info["mismatched_keys"])
        raise SourceError(f"the reference model does not find {', '.join(map(str, names[:5]))}")
    return Reference(model.to(device=device, dtype=dtype).eval(), tuple(notes))


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
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep load reports and bars of transformers off the terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    shown = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _watched(model: Any, watcher: Watcher) -> Iterator[None]:
    """Hooks on a decoder whose layers are ``model.layers.N`` with ``self_attn`` and ``mlp``."""
    parts: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            parts[name] = _first(output)

        return hook

    def enter(index: int) -> Callable[..., None]:
        def hook(_: Any, arguments: Any, named: Any) -> None:
            parts["before"] = arguments[0] if arguments else named["hidden_states"]
            if index == 0:
                watcher.embedded(parts["before"])

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            watcher.layer(index, parts["before"], parts["attention"], parts["mlp"])
            watcher.hidden(index, _first(output))
            parts.clear()

        return hook

    with ExitStack() as stack:

        def on(handle: Any) -> None:
            stack.callback(handle.remove)

        for index, layer in enumerate(model.model.layers):
            on(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
            on(layer.self_attn.register_forward_hook(keep("attention")))
            on(layer.mlp.register_forward_hook(keep("mlp")))
            on(layer.register_forward_hook(leave(index)))
        head = model.get_output_embeddings()
        on(head.register_forward_pre_hook(lambda _, arguments: watcher.normed(arguments[0])))
        yield


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
