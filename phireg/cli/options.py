"""Options that several commands share, their types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from phireg.cli.help import CHECKPOINT, DISPLAY, MODEL, OUTPUT, QUANTIZATION, RANKS, RUNNING
from phireg.dtypes import SHORT_NAMES, WEIGHT_DTYPES
from phireg.errors import UsageError
from phireg.files.sizes import parse_size
from phireg.formats import FORMATS
from phireg.ranges import largest

_Function = TypeVar("_Function", bound=Callable[..., Any])

_CHECKPOINT_DIR = "phireg.cli.options.checkpoint_dir"
QFORMAT_CHOICES = tuple(FORMATS)
KV_CACHE_CHOICES = ("fp8", "int8")


def compute_dtype(name: str) -> str | None:
    """Return the dtype that a backend computes in; None for the model's own."""
    return None if name == "auto" else name


class Dtype(click.Choice[str]):
    """A dtype by its name; upstream's short names (fp16, bf16, fp32) are accepted."""

    def __init__(self, *besides: str) -> None:
        super().__init__((*besides, *WEIGHT_DTYPES))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the full name."""
        return super().convert(SHORT_NAMES.get(value, value), param, ctx)


class Directory(click.types.StringParamType):
    """A directory, checked by the command itself."""

    name = "dir"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Let the shell complete directories."""
        return [CompletionItem(incomplete, type="dir")]


class Whole(click.IntRange):
    """A whole number that is not out of all proportion; help says only the minimum."""

    name = "whole number"

    def __init__(self, minimum: int | None = None) -> None:
        super().__init__(minimum, largest(""))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return what stands for the number in help."""
        return "N"

    def _describe_range(self) -> str:
        return "" if self.min is None else f"x>={self.min}"


COUNT = Whole(1)


class PluginName(click.types.StringParamType):
    """The name of a plugin of a ``kind``, or one of the words ``besides``."""

    name = "name"

    def __init__(self, kind: str, *besides: str) -> None:
        self.kind = kind
        self.besides = besides

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete what is installed."""
        from phireg import registry

        names = [*self.besides, *registry.index(group=f"phireg.{self.kind}")]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class ByteSize(click.ParamType[int]):
    """A number of bytes with a unit, as transformers takes them: 5GB, 500MB, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class QFormat(click.types.StringParamType):
    """A format of weights; ``click.Choice`` would show hyphens, which are only accepted."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name with underscores."""
        name = str(value).replace("-", "_")
        if name not in QFORMAT_CHOICES:
            known = ", ".join(map(repr, QFORMAT_CHOICES))
            self.fail(f"{value!r} is not one of {known}.", param, ctx)
        return name

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """List the formats."""
        return f"Choose from {', '.join(QFORMAT_CHOICES)}."

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the formats."""
        return [CompletionItem(name) for name in QFORMAT_CHOICES if name.startswith(incomplete)]


def _ranks(
    name: str, text: str, default: int | None = None, *, rare: bool = False
) -> Callable[[_Function], _Function]:
    return RANKS.option(name, type=Whole(), default=default, help=text, rare=rare)


def compose(*decorators: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    """Combine options into one decorator; help lists them in this order."""

    def decorate(function: _Function) -> _Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def output_dir_option(noun: str) -> Callable[[_Function], _Function]:
    """``--output-dir``, required."""
    return OUTPUT.option(
        "--output-dir",
        type=Directory(),
        required=True,
        help=f"The {noun} to make. It appears complete, or not at all.",
    )


def overwrite_option(noun: str) -> Callable[[_Function], _Function]:
    """``--overwrite``."""
    return OUTPUT.option(
        "--overwrite",
        is_flag=True,
        help=f"Replace an existing {noun} once the new one is complete.",
    )


def target_option(default: str) -> Callable[[_Function], _Function]:
    """``--target``."""
    return OUTPUT.option(
        "--target",
        type=PluginName("targets"),
        default=default,
        help=f"What to write: {'trtllm, or ' if default == 'trtllm' else ''}a Hugging Face "
        "directory: hf, hf-modelopt, hf-compressed-tensors.",
    )


def quiet_option(text: str = "No progress bar and no summary.") -> Callable[[_Function], _Function]:
    """``--quiet``."""
    return DISPLAY.option("--quiet", is_flag=True, help=text)


def qformat_option(*, required: bool) -> Callable[[_Function], _Function]:
    """``--qformat``."""
    return QUANTIZATION.option(
        "--qformat",
        type=QFormat(),
        required=required,
        help="How linears are quantized; phireg families says which --target takes what.",
    )


def model_dir_option(text: str = "", *, required: bool = False) -> Callable[[_Function], _Function]:
    """``--model-dir``."""
    return MODEL.option(
        "--model-dir",
        aliases=("--hf-model-dir",),
        type=Directory(),
        required=required,
        metavar="DIR|REPO",
        help=text or "The model: a local directory, or owner/name on the Hugging Face hub.",
    )


def checkpoint_argument(
    name: str, metavar: str, *, required: bool = True
) -> Callable[[_Function], _Function]:
    """Let the argument ``name`` be given as ``--checkpoint-dir``, too."""

    def put_aside(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        ctx.meta[_CHECKPOINT_DIR] = value

    def choose(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        other = ctx.meta.get(_CHECKPOINT_DIR)
        if value is not None and other is not None:
            raise UsageError(
                f"{value} and --checkpoint-dir {other} are two directories, and one is taken",
                hint="leave one of them out.",
            )
        if value is None and other is None and required:
            raise click.MissingParameter(ctx=ctx, param=parameter)
        return other if value is None else value

    return compose(
        click.argument(name, type=Directory(), metavar=metavar, required=False, callback=choose),
        CHECKPOINT.option(
            *("--checkpoint-dir", "checkpoint_option"),
            type=Directory(),
            help="Another way to give the argument.",
            is_eager=True,
            expose_value=False,
            callback=put_aside,
            rare=True,
        ),
    )


family_option = MODEL.option(
    "--family",
    type=PluginName("families", "auto"),
    default="auto",
    help="Family, or DISTRIBUTION:FAMILY; auto decides by config.json.",
)
revision_option = MODEL.option(
    "--revision", metavar="REV", help="Branch, tag or commit on the hub."
)
device_option = RUNNING.option(
    "--device", default="auto", metavar="NAME", help="auto (a GPU, if any), cpu, cuda, cuda:N."
)
offload_option = RUNNING.option(
    "--offload/--no-offload",
    default=None,
    help="Executor: read each layer when it is needed.  [default: if the weights exceed memory]",
)
processes_option = RUNNING.option(
    "--tp-size",
    aliases=("--tp",),
    type=COUNT,
    help="Executor: start N processes through torchrun, one for each rank.",
)
report_option = OUTPUT.option(
    "--report",
    type=click.Path(path_type=Path),
    callback=lambda _, __, path: path and check_file(path, "--report"),
    metavar="HTML",
    help="Also write a page about it.",
)
allow_overflow_option = OUTPUT.option(
    "--allow-overflow",
    is_flag=True,
    help="Let values that do not fit into the dtype become infinite.",
)
json_option = DISPLAY.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
)
kv_cache_option = QUANTIZATION.option(
    "--kv-cache-dtype", type=click.Choice(KV_CACHE_CHOICES), help="Also quantize the KV cache."
)
shard_option = OUTPUT.option(
    "--max-shard-size",
    type=ByteSize(),
    default="5GB",
    help="Of a file of a Hugging Face directory.",
    rare=True,
)
reading_options = compose(
    MODEL.option(
        "--weights",
        metavar="FILE|INDEX",
        help="The weights to read, where the directory has more than one set.",
        rare=True,
    ),
    MODEL.option(
        "--adapter",
        type=click.Choice(("merge", "ignore")),
        help="What to do with a LoRA adapter that lies beside the weights.",
        rare=True,
    ),
    MODEL.option(
        "--tie",
        type=click.Choice(("yes", "no")),
        callback=lambda _, __, value: None if value is None else value == "yes",
        help="Whether lm_head is the embedding, where config.json and files disagree.",
        rare=True,
    ),
)
"""Choose a reading of a directory that can be read in more than one way."""

source_options = compose(
    family_option,
    revision_option,
    reading_options,
    MODEL.option(
        "--dtype",
        type=Dtype("auto"),
        default="auto",
        help="Of the checkpoint; auto keeps the model's, but makes float32 float16.",
    ),
    target_option("trtllm"),
    shard_option,
    _ranks("--tp-size", "Tensor-parallel ranks.", 1),
    _ranks("--pp-size", "Pipeline stages; only 1 is possible for Phi.", 1, rare=True),
    _ranks(
        "--moe-tp-size", "Ranks that divide each expert of a mixture.  [default: all]", rare=True
    ),
    _ranks("--moe-ep-size", "Ranks that share the experts out.  [default: 1]", rare=True),
)
"""What decides the plan of a given model, apart from quantization."""

exclude_option = QUANTIZATION.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Modules that stay unquantized, e.g. 'model.layers.0.*'; may be repeated.",
    rare=True,
)

head_option = QUANTIZATION.option(
    "--quantize-lm-head",
    is_flag=True,
    help="Quantize lm_head as well, for Hugging Face targets.",
    rare=True,
)

form_option = OUTPUT.option(
    *("--as", "form"),
    type=click.Choice(("llama",)),
    help="With --target hf: write a Phi-3 as a model of the Llama class.",
    rare=True,
)

planning_options = compose(
    source_options,
    form_option,
    qformat_option(required=False),
    kv_cache_option,
    exclude_option,
    head_option,
)
"""What decides the plan of a conversion or a quantization."""


def check_file(path: Path, option: str) -> Path:
    """Return the path that ``option`` names if a file can be written there; raise what is wrong."""
    from phireg.files.writing import REPORT, STATISTICS, check_writable

    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{option} {path}: no such directory: {path.parent}",
            hint=f"make it first, or give {option} another place.",
        )
    kind = {"--report": REPORT, "--calib-stats": STATISTICS}[option]
    check_writable(path, kind._replace(name=option))
    return path
