"""Looking at a model's layers while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor


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


@contextmanager
def watched(model: Any, watcher: Watcher) -> Iterator[None]:
    """Hooks on a decoder whose layers are ``model.layers.N`` with ``self_attn`` and ``mlp``."""
    parts: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            parts[name] = first(output)

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
            watcher.hidden(index, first(output))
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


def first(output: Any) -> Tensor:
    """Of what a module returns, the hidden states."""
    return output[0] if isinstance(output, tuple) else output
