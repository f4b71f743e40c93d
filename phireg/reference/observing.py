"""Observing a model's layers through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class Observer(Protocol):
    """Receives the reference's intermediate results; tensors are [batch, tokens, hidden_size]."""

    def embedded(self, x: Tensor) -> None:
        """Receive the first layer's input."""

    def layer(self, index: int, before: Tensor, attention: Tensor, mlp: Tensor) -> None:
        """Receive a layer's input, and the outputs of its two sub-modules."""

    def hidden(self, index: int, after: Tensor) -> None:
        """Receive a layer's output."""

    def normed(self, u: Tensor) -> None:
        """Receive the final norm's output, which is lm_head's input."""


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[None]:
    """Hook a decoder whose layers are ``model.layers.N`` with ``self_attn`` and ``mlp``."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs[name] = hidden_states(output)

        return hook

    def enter(index: int) -> Callable[..., None]:
        def hook(_: Any, arguments: Any, named: Any) -> None:
            outputs["before"] = arguments[0] if arguments else named["hidden_states"]
            if index == 0:
                observer.embedded(outputs["before"])

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            observer.layer(index, outputs["before"], outputs["attention"], outputs["mlp"])
            observer.hidden(index, hidden_states(output))
            outputs.clear()

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            for handle in (
                layer.register_forward_pre_hook(enter(index), with_kwargs=True),
                layer.self_attn.register_forward_hook(keep("attention")),
                layer.mlp.register_forward_hook(keep("mlp")),
                layer.register_forward_hook(leave(index)),
            ):
                stack.callback(handle.remove)
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, inputs: observer.normed(inputs[0]))
        stack.callback(handle.remove)
        yield


@contextmanager
def inputs_seen(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Pass the name and the input of every call of the modules to ``see``."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda _, x, name=name: see(name, x[0]))
            stack.callback(handle.remove)
        yield


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states among a module's outputs."""
    return output[0] if isinstance(output, tuple) else output
