"""The source's own model: transformers' class, or the one that the family ships.

Its weights are read from the source's files as data. A reference keeps all of them, or has one
decoder layer's in memory at a time; the results are the same.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from phireg.dtypes import WEIGHT_DTYPES, torch_dtype
from phireg.errors import SourceError
from phireg.family import Family
from phireg.files.json import read_json_object
from phireg.reference.quiet import quiet
from phireg.source.model import Reader, Source
from phireg.source.tensors import SourceTensor

_LAYERS = "model.layers."
_FLOATS = {*WEIGHT_DTYPES.values(), "F64"}


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference whose weights are not read yet: call ``keep_all`` or ``keep_ends``, or ``layer``.

    ``model`` is a transformers causal language model; its layers are ``model.model.layers``.
    """

    model: Any
    notes: tuple[str, ...]  # settings that differ from the source's config.json, with the reason
    parameters: Parameters

    def keep_all(self) -> None:
        """Read all weights and keep them."""
        self.parameters.fill(self.parameters.names())

    def keep_ends(self) -> None:
        """Read embedding, final norm and lm_head; every forward pass reads each layer anew."""
        self.parameters.fill(self._ends())
        for index, layer in enumerate(self.model.model.layers):
            names = self._layer(index)
            layer.register_forward_pre_hook(lambda *_, names=names: self.parameters.fill(names))
            layer.register_forward_hook(lambda *_, names=names: self.parameters.release(names))

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """Yield a decoder layer whose weights are in memory inside the ``with`` statement only."""
        names = self._layer(index)
        self.parameters.fill(names)
        try:
            yield self.model.model.layers[index]
        finally:
            self.parameters.release(names)

    @property
    def nbytes(self) -> int:
        """Memory of all weights."""
        return self.parameters.nbytes(self.parameters.names())

    @property
    def streamed_nbytes(self) -> int:
        """Memory of the weights when only the ends are kept: theirs and the largest layer's."""
        layers = range(len(self.model.model.layers))
        largest = max((self.parameters.nbytes(self._layer(index)) for index in layers), default=0)
        return self.parameters.nbytes(self._ends()) + largest

    def logits(self, ids: Tensor, observer: Observer) -> Tensor:
        """Compute float32 logits [batch, tokens, vocab_size] of ``ids`` without a cache."""
        with torch.no_grad(), observed(self.model, observer):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def _layer(self, index: int) -> list[str]:
        return self.parameters.names(f"{_LAYERS}{index}.")

    def _ends(self) -> list[str]:
        return [name for name in self.parameters.names() if not name.startswith(_LAYERS)]


def open_reference(
    family: Family,
    source: Source,
    *,
    weights: torch.dtype | None,
    dtype: torch.dtype,
    device: torch.device,
    exact: Collection[str] = (),
) -> Reference:
    """Build the source's model without reading its weights; no code of the source is run.

    Values are rounded to ``weights`` first, apart from the tensors named in ``exact``, as a
    conversion does, so that differences from a checkpoint are arithmetic and not rounding.
    ``dtype`` is that of the computation. SourceError if no model class here reads the source.
    """
    model, notes = _build(family, source.directory, dtype)
    parameters = Parameters(model, source, weights, device, exact)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Moved and not cast: rotary tables are float32 whatever the compute dtype is.
            module._buffers[name] = buffer.to(device)
    return Reference(model, tuple(notes), parameters)


def _build(family: Family, directory: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Build a model with its parameters on the meta device; return it and notes on its config.

    Buffers (rotary tables) hold their values, on the CPU and in the dtype their class gives them.
    """
    import transformers

    values = read_json_object(directory / "config.json")
    values.pop("quantization_config", None)
    notes = list(_adapted(values)) if family.reference is None else []
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        with quiet(), _parameters_on_meta(dtype):
            if family.reference is None:
                config = transformers.AutoConfig.for_model(**values)
                model = transformers.AutoModelForCausalLM.from_config(config, **{key: dtype})
            else:
                model_class: Any = pkgutil.resolve_name(family.reference)
                config = model_class.config_class(**values)
                model = model_class._from_config(config, **{key: dtype})
    except Exception as error:  # whatever transformers raises, this machine has no reference
        raise SourceError(
            f"the reference model cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    return model.eval(), notes


def _adapted(values: dict[str, Any]) -> Iterator[str]:
    """Adapt a config to current transformers; yield a note on each change of meaning."""
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
def _parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Put the parameters of modules built inside on the meta device; buffers keep their values.

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


# Parameters, read from the files on demand


class Parameters:
    """Fills and empties the parameters of a model that was built without them.

    Values are rounded to ``rounded`` on their way to the parameters' dtype, except those of the
    source tensors named in ``exact``.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        rounded: torch.dtype | None,
        device: torch.device,
        exact: Collection[str] = (),
    ) -> None:
        self._source = source
        self._rounded = rounded
        self._device = device
        self._exact = exact
        tied = _tied(model)
        self._places: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        self._tensors: dict[str, SourceTensor] = {}
        absent, wrong = [], []
        for prefix, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                self._places[name] = module, leaf, parameter
                tensor = source.tensors.get(tied.get(name, name))
                if tensor is None:
                    absent.append(name)
                elif tensor.shape != tuple(parameter.shape) or tensor.dtype not in _FLOATS:
                    shape = f"{tensor.dtype} {list(tensor.shape)}, not {list(parameter.shape)}"
                    wrong.append(f"{name} is {shape}")
                else:
                    self._tensors[name] = tensor
        if absent:
            raise SourceError(f"the reference model does not find {', '.join(absent[:5])}")
        if wrong:
            raise SourceError(f"the reference model cannot take {'; '.join(wrong[:5])}")

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the parameters that begin with a prefix."""
        return [name for name in self._places if name.startswith(prefix)]

    def nbytes(self, names: Collection[str]) -> int:
        """Return the memory that these parameters take when filled, tied ones once."""
        places = {self._tensors[name].name: self._places[name][2] for name in names}
        return sum(parameter.numel() * parameter.itemsize for parameter in places.values())

    def fill(self, names: Collection[str]) -> None:
        """Read parameters; tied ones that are filled together share their memory."""
        read: dict[str, nn.Parameter] = {}
        with self._source.open() as reader:
            for name in names:
                module, leaf, empty = self._places[name]
                tensor = self._tensors[name]
                if tensor.name not in read:
                    values = self._read(reader, tensor).to(empty.dtype)
                    read[tensor.name] = nn.Parameter(values, requires_grad=False)
                setattr(module, leaf, read[tensor.name])

    def release(self, names: Collection[str]) -> None:
        """Free the memory of parameters."""
        for name in names:
            module, leaf, empty = self._places[name]
            setattr(module, leaf, empty)

    def _read(self, reader: Reader, tensor: SourceTensor) -> Tensor:
        """Read a tensor's values to the device, rounded unless it is exact."""
        values = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        reader.read_into(tensor, 0, memoryview(values.view(-1).view(torch.uint8).numpy()))
        values = values.to(self._device)
        if self._rounded is None or tensor.name in self._exact:
            return values
        return values.to(self._rounded)


def _tied(model: Any) -> dict[str, str]:
    """Map the name of a tied parameter to the name of the one it repeats."""
    if not model.config.tie_word_embeddings:
        return {}
    names = {module: name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[head]}.weight": f"{names[embedding]}.weight"}


# Observing a model's layers through forward hooks


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
        handles = []
        for index, layer in enumerate(model.model.layers):
            handles += [
                layer.register_forward_pre_hook(enter(index), with_kwargs=True),
                layer.self_attn.register_forward_hook(keep("attention")),
                layer.mlp.register_forward_hook(keep("mlp")),
                layer.register_forward_hook(leave(index)),
            ]
        head = model.get_output_embeddings()
        handles.append(head.register_forward_pre_hook(lambda _, inputs: observer.normed(inputs[0])))
        for handle in handles:
            stack.callback(handle.remove)
        yield


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states among a module's outputs."""
    return output[0] if isinstance(output, tuple) else output
