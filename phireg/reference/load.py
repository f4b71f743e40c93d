"""The source's own model: transformers' class, or the one that the family ships.

It is built of the directory alone, as ``from_pretrained`` would, and its weights are read as data.
A reference keeps all of them, or has one decoder layer's in memory at a time; the results are the
same.
"""

from __future__ import annotations

import pkgutil
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import SourceError
from phireg.family import Family
from phireg.reference.config import adapt, check_sizes, read_values
from phireg.reference.layouts import SEPARATE, Parts, locate
from phireg.reference.observing import Observer, observed
from phireg.reference.quiet import quiet
from phireg.reference.weights import Weights, find_weights
from phireg.source.adapter import Layer
from phireg.source.model import Reader

Change = Callable[[dict[str, Any]], None]

_LAYERS = "model.layers."
_FLOATS = {*WEIGHT_DTYPES.values(), "F64"}


@dataclass(frozen=True, slots=True)
class Reference:
    """A transformers model whose weights ``keep_all``, ``keep_ends`` or ``layer`` reads."""

    model: Any
    notes: tuple[str, ...]  # settings that differ from the source's config.json, with the reason
    parameters: Parameters

    def keep_all(self) -> None:
        """Read all weights and keep them."""
        self.parameters.fill(self.parameters.names())

    def keep_ends(self) -> None:
        """Read embedding, final norm and lm_head; hooks read each layer when it is run."""
        self.parameters.fill(self._ends())
        parameters = weakref.proxy(self.parameters)  # which has the model's modules
        for index, layer in enumerate(self.model.model.layers):
            names = self._layer(index)
            layer.register_forward_pre_hook(lambda *_, names=names: parameters.fill(names))
            layer.register_forward_hook(lambda *_, names=names: parameters.release(names))

    @contextmanager
    def layer(self, index: int, *, ahead: bool = False) -> Iterator[Any]:
        """Yield a decoder layer whose weights are in memory inside the ``with`` statement only.

        With ``ahead``, on a GPU, a thread reads the next layer's meanwhile; then whatever uses this
        layer's must have finished at the end of the statement.
        """
        with self.parameters.held(f"{_LAYERS}{index}."):
            if ahead and (following := self._layer(index + 1)):
                self.parameters.read_ahead(following)
            yield self.model.model.layers[index]

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

    def logits(self, ids: Tensor, observer: Observer | None = None) -> Tensor:
        """Compute float32 logits [batch, tokens, vocab_size] of ``ids`` without a cache."""
        hooks = nullcontext() if observer is None else observed(self.model, observer)
        with torch.no_grad(), hooks:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def _layer(self, index: int) -> list[str]:
        return self.parameters.names(f"{_LAYERS}{index}.")

    def _ends(self) -> list[str]:
        return [name for name in self.parameters.names() if not name.startswith(_LAYERS)]


def open_reference(
    family: Family,
    directory: Path,
    *,
    weights: torch.dtype | None,  # that values are rounded to first, as a conversion rounds them
    dtype: torch.dtype,  # of the computation
    device: torch.device,
    exact: Collection[str] = (),  # source tensors that are not rounded
    file: str | None = None,  # of weights, or an index, instead of what transformers loads
    adapter: str | None = None,  # "merge" adds the LoRA adapter beside the weights
    tie: bool | None = None,  # lm_head is the embedding, instead of what transformers decides
    change: Change | None = None,  # of config.json's values, before the class takes them
) -> Reference:
    """Build the source's model without weights and its code; SourceError if no class reads it."""
    loaded = find_weights(directory, file, adapter=adapter == "merge")
    model, notes, stated = _build(family, loaded, dtype, change)
    parameters = Parameters(model, loaded, tie, stated, weights, device, exact)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Moved and not cast: rotary tables are float32 whatever the compute dtype is.
            module._buffers[name] = buffer.to(device)
    return Reference(model, tuple(notes), parameters)


def _build(
    family: Family, weights: Weights, dtype: torch.dtype, change: Change | None
) -> tuple[Any, list[str], bool]:
    """Build a model on the meta device; also notes on its config, and if that speaks of ties."""
    import transformers

    values = read_values(weights.directory)
    check_sizes(values, weights.tensors.values())
    stated = values.get("tie_word_embeddings") is not None
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    notes: list[str] = []
    try:
        with quiet(), _parameters_on_meta(dtype):
            if family.reference is None:
                notes = adapt(values)
            if change is not None:
                change(values)
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
    return model.eval(), notes, stated


@contextmanager
def _parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Put parameters made inside on the meta device, but not buffers: no file has rotary tables."""
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


class Parameters:
    """Fills parameters from files, ``rounded`` to a dtype unless ``exact``, and empties them."""

    def __init__(
        self,
        model: Any,
        weights: Weights,
        tie: bool | None,
        stated: bool,
        rounded: torch.dtype | None,
        device: torch.device,
        exact: Collection[str] = (),
    ) -> None:
        self.weights = weights
        self.notes: list[str] = []
        self._rounded = rounded
        self._device = device
        self._exact = exact
        self._places: dict[str, tuple[nn.Module, str, nn.Parameter]] = {
            f"{prefix}.{leaf}": (module, leaf, parameter)
            for prefix, module in model.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        config = model.config
        located = locate(
            tuple(self._places),
            weights.tensors,
            heads=getattr(config, "num_attention_heads", 1),
            layers=len(model.model.layers),
        )
        self.tied = self._tie(model, located, tie, stated)
        if absent := [name for name, parts in located.items() if parts is None]:
            raise SourceError(f"the reference model does not find {', '.join(absent[:5])}")
        self._parts = {name: parts for name, parts in located.items() if parts is not None}
        if wrong := list(self._misshapen()):
            raise SourceError(f"the reference model cannot take {'; '.join(wrong[:5])}")
        self._added = self._place_adapter(config)
        self._stream: Any = None  # of a GPU, for what is read ahead
        self._coming: tuple[Collection[str], Future[Mapping[str, nn.Parameter]]] | None = None

    def _tie(
        self, model: Any, located: dict[str, Parts | None], tie: bool | None, stated: bool
    ) -> bool:
        """Decide as transformers 5 does whether lm_head is the embedding, and make it so."""
        names = {module: f"{name}.weight" for name, module in model.named_modules()}
        head, embedding = names[model.get_output_embeddings()], names[model.get_input_embeddings()]
        self._ends = [
            self.weights.tensors[parts.tensors[0]]
            for name in (embedding, head)
            if (parts := located[name]) is not None
        ]
        if tie is None and not model.config.tie_word_embeddings:
            # transformers would leave an absent head random.
            tie = located[head] is None and not stated
            if tie:
                self.notes.append(
                    f"no file holds {head} and config.json does not say tie_word_embeddings: it is "
                    "taken for the embedding"
                )
        elif tie is None:
            tie = len(self._ends) < 2 or self.ends_are_equal()
            if not tie:
                self.notes.append(
                    f"config.json ties {head} to {embedding}, but their values differ: not tied, "
                    "as transformers 5 reads them (4 ties them all the same)"
                )
        if tie:
            located[head] = located[embedding] = located[embedding] or located[head]
        return tie

    def ends_are_equal(self) -> bool:
        """Return whether the files hold both lm_head and the embedding, with the same values."""
        return len(self._ends) == 2 and self.weights.equal(*self._ends)

    def _misshapen(self) -> Iterator[str]:
        for name, parts in self._parts.items():
            tensors = [self.weights.tensors[tensor] for tensor in parts.tensors]
            shape = self._places[name][2].shape
            try:
                empty = [torch.empty(t.shape, device="meta") for t in tensors]
                actual = parts.assemble(empty).shape
            except (RuntimeError, IndexError):  # rows that cannot be put together so
                actual = None
            if actual != shape or not _FLOATS.issuperset(tensor.dtype for tensor in tensors):
                kinds = " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
                yield f"{name} is {kinds}, not {list(shape)}"

    def _place_adapter(self, config: Any) -> dict[Parts, list[tuple[int, Layer]]]:
        """Return the LoRA layers of parameters, each with the first row that it is added to."""
        if self.weights.adapter is None:
            return {}
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        rows = {
            "q_proj": 0,
            "k_proj": queries,
            "v_proj": queries + keys,
            "gate_proj": 0,
            "up_proj": config.intermediate_size,
        }
        fused = {part: whole for whole, parts in SEPARATE.items() for part in parts}
        added: dict[Parts, list[tuple[int, Layer]]] = {}
        for layer in self.weights.adapter.layers:
            module, row = layer.module, 0
            stem, _, last = module.rpartition(".")
            if f"{module}.weight" not in self._parts and last in fused:
                module, row = f"{stem}.{fused[last]}", rows[last]
            parts = self._parts.get(f"{module}.weight")
            if parts is None:
                raise SourceError(
                    f"the adapter has layers for {layer.module[:200]}, the model has not"
                )
            height, width = self._places[f"{module}.weight"][2].shape
            if layer.shape[1] != width or row + layer.shape[0] > height:
                raise SourceError(
                    f"the adapter's layers of {layer.module[:200]} do not fit the model"
                )
            added.setdefault(parts, []).append((row, layer))
        return added

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the parameters that begin with a prefix."""
        return [name for name in self._places if name.startswith(prefix)]

    def source_modules(self, module: str) -> tuple[str, ...]:
        """Return the modules of the files whose rows a linear of the model has."""
        parts = self._parts[f"{module}.weight"]
        return tuple(name.removesuffix(".weight") for name in parts.tensors)

    def nbytes(self, names: Collection[str]) -> int:
        """Return the memory that these parameters take when filled, tied ones once."""
        places = {self._parts[name]: self._places[name][2] for name in names}
        return sum(parameter.numel() * parameter.itemsize for parameter in places.values())

    def fill(self, names: Collection[str]) -> None:
        """Read parameters; tied ones that are filled together share their memory."""
        ahead, self._coming = self._coming, None
        read = ahead[1].result() if ahead and ahead[0] == names else self._read_all(names)
        for name, parameter in read.items():
            module, leaf, _ = self._places[name]
            setattr(module, leaf, parameter)

    def read_ahead(self, names: Collection[str]) -> None:
        """Begin to read the parameters that :meth:`fill` takes next, to a GPU, in a thread."""
        if self._stream is None:  # of its own: copies do not wait for what is computed meanwhile
            self._stream = torch.cuda.Stream(self._device)

        def read() -> Mapping[str, nn.Parameter]:
            with torch.cuda.stream(self._stream):
                parameters = self._read_all(names)
                self._stream.synchronize()
            return parameters

        self._coming = names, ThreadPoolExecutor(1).submit(read)

    def _read_all(self, names: Collection[str]) -> Mapping[str, nn.Parameter]:
        read: dict[Parts, nn.Parameter] = {}
        with self.weights.open() as reader:
            for name in names:
                parts = self._parts[name]
                if parts not in read:
                    values = self._read(reader, parts).to(self._places[name][2].dtype)
                    read[parts] = nn.Parameter(values, requires_grad=False)
        return {name: read[self._parts[name]] for name in names}

    def release(self, names: Collection[str]) -> None:
        """Free the memory of parameters."""
        for name in names:
            module, leaf, empty = self._places[name]
            setattr(module, leaf, empty)

    @contextmanager
    def held(self, prefix: str) -> Iterator[None]:
        """Hold the parameters that begin with a prefix inside the ``with`` statement only."""
        names = self.names(prefix)
        self.fill(names)
        try:
            yield
        finally:
            self.release(names)

    def _read(self, reader: Reader, parts: Parts) -> Tensor:
        """Read a parameter's values to the device, rounded unless they are exact."""
        tensors = [self.weights.tensors[name] for name in parts.tensors]
        stored = [self.weights.read(reader, tensor, self._device) for tensor in tensors]
        values = parts.assemble(stored)
        if parts in self._added:
            sums = values.float()
            for row, layer in self._added[parts]:
                up, down = (self.weights.read(reader, t).float() for t in (layer.up, layer.down))
                product = layer.scale * (up @ down)
                sums[row : row + layer.shape[0]] += (product.T if layer.embedding else product).to(
                    self._device
                )
            values = sums.to(values.dtype)
        if self._rounded is None or all(tensor.name in self._exact for tensor in tensors):
            return values
        return values.to(self._rounded)
