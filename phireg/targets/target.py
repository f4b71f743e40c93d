"""A target: names, companions, config files and files of what is written, whoever reads it.

A target stands beside a family: the family says what a model's modules are made of, the target
which of them a file holds, under which names, and how quantized ones are stored. Third parties
offer more in the entry-point group ``phireg.targets``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from phireg.config.hf import HFConfig
from phireg.errors import PhiregError, PluginError, UsageError, described, shortened
from phireg.files.kinds import BUILD_FILE, MANIFEST, TOKENIZER_FILES, WEIGHTS
from phireg.formats import FORMATS, Format
from phireg.layout.ranks import Ranks
from phireg.layout.rules import QuantRules, Rules
from phireg.layout.spans import LayoutError, Span

_Result = TypeVar("_Result")

API = 1
"""The number of this interface; a target states the one that it was written against."""

WEIGHT_SCALE = "weights_scaling_factor"
INPUT_SCALE = "activation_scaling_factor"
PRE_SCALE = "prequant_scaling_factor"
SECOND_SCALE = "weights_scaling_factor_2"
KV_SCALE, KEY_SCALE, VALUE_SCALE = (
    "kv_cache_scaling_factor",
    "k_cache_scaling_factor",
    "v_cache_scaling_factor",
)
"""What a scale is, by TensorRT-LLM's names. KV_SCALE serves keys and values alike; SECOND_SCALE
multiplies those of groups."""

SHAPE = "weight_shape"
"""Rows and columns of a packed weight, two whole numbers among its scales."""

PACKINGS = {None: (1, 1), "rows": (2, 1), "columns": (1, 2), "words": (1, 8)}
"""Rows and columns of levels that one stored element has: two rows or columns in a byte, or eight
columns in a 32-bit word (``phireg.conversion.groups``)."""


_NOT_ITS = (
    *TOKENIZER_FILES, "tokenizer.*.json", "chat_template.json", MANIFEST, BUILD_FILE,
    *(f"{weights}.index.json" for weights in WEIGHTS),
)  # fmt: skip

DEFECT = "this is a defect of the target; report it to its authors."


def ask(target: Target, method: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call the target's own version of a method of :class:`Target`; its defects are its authors'.

    Results must be of the types stated here. Methods that are given rules may raise LayoutError.
    """
    name, kind = method.__name__, get_type_hints(method)["return"]
    try:
        result: Any = getattr(target, name)(*arguments)
        if isinstance(result, Iterator):
            result = list(result)
        if not _fits(result, kind):
            raise TypeError(f"it returned {shortened(repr(result), 200)}, not {kind}")
    except (PhiregError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, LayoutError) and any(isinstance(one, Rules) for one in arguments):
            raise
        raise PluginError(
            f"target '{target.name}': {name} failed with {described(error)}", hint=DEFECT
        ) from error
    return cast(_Result, result)


def check_fields(target: Target) -> None:
    """Raise a PluginError if what a target says of itself cannot be so."""
    problems = []
    for name, kind in (get_type_hints(Target) | {"formats": tuple[str, ...]}).items():
        try:
            if not _fits(value := getattr(target, name), kind):
                problems.append(f"{name} is {shortened(repr(value), 200)}, not {kind}")
            elif name == "api" and value != API:
                raise PluginError(
                    f"target '{target.name}' was written for API {value}; this phireg has API "
                    f"{API}",
                    hint=f"upgrade {'phireg' if value > API else 'the plugin'}, "
                    "or install versions that fit together.",
                )
            elif name in ("layouts", "formats"):
                known = FORMATS if name == "layouts" else target.layouts
                if unknown := sorted(set(value) - known.keys()):
                    problems.append(f"{name} has {', '.join(unknown)}; known: {', '.join(known)}")
        except (PluginError, KeyboardInterrupt):
            raise
        except BaseException as error:
            problems.append(f"{name} failed with {described(error)}")
    _refuse(target, problems)


def check_files(target: Target, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a PluginError if config files could not be written, or would replace others."""
    problems = [] if "config.json" in files else ["config_files returned no config.json"]
    lower = Counter(name.lower() for name in files)  # some file systems tell no case
    for name, document in files.items():
        said = f"config_files returned {shortened(repr(name), 200)}"
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{,249}\.json", name, re.ASCII):
            problems.append(f"{said}, which is no plain name of up to 255 characters and .json")
        elif any(fnmatchcase(name.lower(), pattern.lower()) for pattern in _NOT_ITS):
            problems.append(f"{said}, a file that has other contents")
        elif lower[name.lower()] > 1:
            problems.append(f"{said} in upper and lower case")
        try:
            json.dumps(document, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(f"{said} with what JSON cannot hold: {described(error)}")
    _refuse(target, problems)


def _refuse(target: Target, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"target '{target.name}': {problem}" for problem in problems)
        raise PluginError(lines, hint=DEFECT)


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, down to what its collections hold."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (Layout, Stored):
        fields = get_type_hints(origin).items()
        return isinstance(value, origin) and all(_fits(getattr(value, n), k) for n, k in fields)
    if origin is Any or not isinstance(value, origin) or not parts:
        return origin is Any or isinstance(value, origin)
    if issubclass(origin, Mapping):
        return all(_fits(key, parts[0]) and _fits(one, parts[1]) for key, one in value.items())
    if origin is tuple and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return all(_fits(one, parts[0]) for one in value)


@dataclass(frozen=True, slots=True)
class Stored:
    """How a scale is stored.

    Attributes:
        name: path below its module, e.g. ``weight_scale`` or ``k_proj.k_scale``.
        code: safetensors code, or None for the model's dtype.
        shape: ``vector`` [n] ([1] for a single number), ``scalar`` [] or ``column`` [n, 1].
        divides: whether the reader divides by it, where others multiply: its reciprocal is stored.
    """

    name: str
    code: str | None = "F32"
    shape: Literal["vector", "scalar", "column"] = "vector"
    divides: bool = False

    def sizes(self, planned: tuple[int, ...]) -> tuple[int, ...]:
        """Return the stored shape of a scale of the planned one."""
        if self.shape == "scalar":
            return ()
        return (*planned, 1) if self.shape == "column" else planned


@dataclass(frozen=True, slots=True)
class Layout:
    """How linears of a format are stored.

    Attributes:
        algorithm: what the reader calls the format.
        weight: safetensors code of quantized weights; None if files have raw ones, which the
            reader quantizes.
        scales: by what they are.
        packing: a key of PACKINGS, of levels of four bits.
        weight_name: what the weight is called, after the module's name.
    """

    algorithm: str
    weight: str | None
    scales: Mapping[str, Stored]
    packing: Literal["rows", "columns", "words"] | None = None
    weight_name: str = "weight"


@dataclass(frozen=True, slots=True)
class Quantized:
    """What is quantized in one directory.

    Attributes:
        format: of the linears.
        layout: of the same.
        kv_cache: ``fp8``, ``int8`` or None.
        linears: the modules that are quantized.
        excluded: linears of the same kinds that are not.
    """

    format: Format
    layout: Layout
    kv_cache: str | None
    linears: tuple[str, ...]
    excluded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """The model of one directory, as its config files tell it.

    Attributes:
        fields: the translated config, by TensorRT-LLM's names.
        hf: the source's config.json.
        dtype: of what is not quantized.
        quantized: what is.
        ranks: that the model is divided over.
    """

    fields: Mapping[str, Any]
    hf: HFConfig
    dtype: str
    quantized: Quantized | None
    ranks: Ranks


@dataclass(frozen=True, kw_only=True)
class Target:
    """A value of ``--target``.

    Attributes:
        name: what users type; the entry point must have the same name.
        summary: one line for tables.
        api: :data:`API`, as a literal.
        layouts: the formats that its readers take, by ``--qformat``.
        kv_caches: by ``--kv-cache-dtype``, the scales of an attention module's cache.
        folds: where AWQ's factors stand, if not beside a linear: ``shared``, in a norm whose
            output several linears see; ``all``, in every norm, and in the rows whose outputs are a
            linear's inputs (:meth:`fed_rows`), so that the linears that neither feeds have none.
        by_rank: whether files are those of tensor-parallel ranks; else they are shards of bounded
            size.
    """

    name: str
    summary: str
    api: int
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    kv_caches: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    folds: Literal["shared", "all"] | None = None
    by_rank: bool = False

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that its readers take, in the order of FORMATS."""
        return tuple(name for name in FORMATS if name in self.layouts)

    @property
    def only_quantized(self) -> bool:
        """Whether it is a layout of quantized models: any with formats but TensorRT-LLM's."""
        return bool(self.layouts) and not self.by_rank

    def written_as(self, form: str | None) -> Target:
        """Return the target that writes models as another class, such as ``llama``.

        Raises:
            UsageError: there is no such form.
        """
        if form is not None:
            raise UsageError(
                f"--target {self.name} cannot write a model as '{form}'",
                hint="--as llama goes with --target hf.",
            )
        return self

    def problems(self, fields: Mapping[str, Any], hf: HFConfig) -> Iterable[tuple[str, str]]:
        """Return why a model cannot be written so: the config's key, and what is wrong with it."""
        return ()

    def rules(self, rules: Rules, fields: Mapping[str, Any]) -> Rules:
        """Return the rules of this target's modules, from the family's; here TensorRT-LLM's own."""
        return rules

    def quantized_modules(self, quant: QuantRules, rules: Rules) -> QuantRules:
        """Return the linears and caches of the family's quantization rules by their names here."""
        return quant

    def shared_inputs(self, rules: Rules) -> Mapping[str, tuple[str, ...]]:
        """Return the groups of linears that readers fuse or that see one norm's output, by norm.

        ``rules`` are the family's. Where a format has a scale of a whole weight beside those of
        its groups, the linears of such a group have the same.
        """
        return {}

    def fed_rows(
        self, rules: Rules, fields: Mapping[str, Any]
    ) -> Mapping[str, tuple[str, tuple[Span, ...]]]:
        """Return the rows whose outputs are a linear's inputs, in order, by the linear.

        They are the module's that has them, and its rows. ``rules`` are the family's.
        """
        return {}

    def config_files(self, model: WrittenModel) -> dict[str, dict[str, Any]]:
        """Return the JSON files of the directory by name; config.json among them.

        Names are plain and end in .json. Those of weights, tokenizers and phireg's own are not
        free, in upper case neither.
        """
        raise NotImplementedError
