"""Options that several commands share, and the plan they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

import phireg
from phireg.dtypes import SHORT_NAMES, WEIGHT_DTYPES
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.planning.model import Plan

_Function = TypeVar("_Function", bound=Callable[..., Any])

DTYPE_CHOICES = ("auto", *WEIGHT_DTYPES)
COMPUTE_DTYPES = (*DTYPE_CHOICES, *SHORT_NAMES)
PRECISION_CHOICES = ("int8", "int4")
DEFAULT_PRECISION = "int8"
QFORMAT_CHOICES = ("fp8", "int8_sq", "int8_wo", "int4_wo")
KV_CACHE_CHOICES = ("fp8", "int8")


def compute_dtype(name: str) -> str | None:
    """Return the full name of a choice of ``COMPUTE_DTYPES``; None for the model's own dtype."""
    return None if name == "auto" else SHORT_NAMES.get(name, name)


class Directory(click.types.StringParamType):
    """A path that the commands themselves look at; a shell completes it with directories."""

    name = "directory"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Leave it to the shell."""
        return [CompletionItem(incomplete, type="dir")]


class FamilyName(click.types.StringParamType):
    """A family; which exist is for the registry to say.

    Args:
        besides: a word that is accepted too.
    """

    name = "name"

    def __init__(self, besides: str = "auto") -> None:
        self.besides = besides

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The families that are installed."""
        from phireg import registry

        names = [self.besides, *registry.index()]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class QFormat(click.types.StringParamType):
    """A format of quantized weights, by the name that help, errors and completion give it.

    ``click.Choice`` would give them hyphens, since options are normalized so. Those pass, too.
    """

    name = "qformat"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name with underscores."""
        name = str(value).replace("-", "_")
        if name not in QFORMAT_CHOICES:
            known = ", ".join(map(repr, QFORMAT_CHOICES))
            self.fail(f"{value!r} is not one of {known}.", param, ctx)
        return name

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What may be given; click 8.1 gives no context."""
        return f"Choose from {', '.join(QFORMAT_CHOICES)}."

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The formats."""
        return [CompletionItem(name) for name in QFORMAT_CHOICES if name.startswith(incomplete)]


model_dir_option = click.option(
    "--model-dir",
    type=Directory(),
    required=True,
    metavar="DIR|REPO",
    help="The model: a local directory, or owner/name on the Hugging Face hub.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
)


def source_options(function: _Function) -> _Function:
    """What decides the plan of a given model, apart from quantization."""
    for option in reversed(
        (
            click.option(
                "--family",
                type=FamilyName(),
                default="auto",
                show_default=True,
                help="Family, or DISTRIBUTION:FAMILY; auto decides by config.json.",
            ),
            click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub."),
            click.option(
                "--dtype",
                type=click.Choice(DTYPE_CHOICES),
                default="auto",
                show_default=True,
                help="Of the checkpoint; auto keeps the model's, but makes float32 float16.",
            ),
            click.option(
                "--tp-size",
                type=int,
                default=1,
                show_default=True,
                metavar="N",
                help="Tensor-parallel ranks.",
            ),
            click.option(
                "--pp-size",
                type=int,
                default=1,
                show_default=True,
                metavar="N",
                help="Pipeline stages; only 1 is possible for Phi.",
            ),
            click.option(
                "--moe-tp-size",
                type=int,
                metavar="N",
                help="Ranks that divide each expert of a mixture.  [default: all]",
            ),
            click.option(
                "--moe-ep-size",
                type=int,
                metavar="N",
                help="Ranks that share the experts out.  [default: 1]",
            ),
        )
    ):
        function = option(function)
    return function


def conversion_options(function: _Function) -> _Function:
    """What decides the plan of a given model."""
    for option in reversed(
        (
            source_options,
            click.option(
                "--use-weight-only",
                is_flag=True,
                help="Have TensorRT-LLM's builder quantize the weights.",
            ),
            click.option(
                "--weight-only-precision",
                type=click.Choice(PRECISION_CHOICES),
                help=f"With --use-weight-only.  [default: {DEFAULT_PRECISION}]",
            ),
        )
    ):
        function = option(function)
    return function


def qformat_option(*, required: bool) -> Callable[[_Function], _Function]:
    """``--qformat``."""
    return click.option(
        "--qformat",
        type=QFormat(),
        metavar=f"[{'|'.join(QFORMAT_CHOICES)}]",
        required=required,
        help="FP8, INT8 SmoothQuant, or weights only, which TensorRT-LLM's builder quantizes.",
    )


kv_cache_option = click.option(
    "--kv-cache-dtype", type=click.Choice(KV_CACHE_CHOICES), help="Also quantize the KV cache."
)


def planning_options(function: _Function) -> _Function:
    """What decides the plan of a conversion or a quantization."""
    for option in (kv_cache_option, qformat_option(required=False), conversion_options):
        function = option(function)
    return function


def make_plan(
    model_dir: str,
    *,
    use_weight_only: bool,
    weight_only_precision: str | None,
    qformat: str | None = None,
    **options: Any,
) -> Plan:
    """Plan what :func:`conversion_options` or :func:`planning_options` describe.

    Raises:
        UsageError: a precision without the flag that it belongs to, or that flag with a format.
        PhiregError: as :func:`phireg.planning.plan`.
    """
    if weight_only_precision and not use_weight_only:
        raise UsageError(
            f"--weight-only-precision {weight_only_precision} has no effect without "
            "--use-weight-only",
            hint="add --use-weight-only, or leave out the precision.",
        )
    if use_weight_only and qformat:
        raise UsageError(
            f"--use-weight-only and --qformat {qformat} exclude each other",
            hint="--use-weight-only is what convert takes, --qformat what quantize takes; leave "
            "one of them out.",
        )

    precision = weight_only_precision or DEFAULT_PRECISION
    weight_only = precision if use_weight_only else None
    return phireg.plan(model_dir, weight_only=weight_only, qformat=qformat, **options)
