"""``phireg build``: build an engine from a checkpoint, with TensorRT-LLM or without."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli import engines, options
from phireg.cli.errors import interruptible, warn
from phireg.cli.help import ENGINE, MODEL, OUTPUT, RANKS, RUNNING, Command, documented
from phireg.cli.output import ProgressBars, columns, counted, emit, emit_json, printable
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import EngineError, UsageError
from phireg.files.sizes import size

if TYPE_CHECKING:
    from phireg.trtllm.build import BuildPlan, Built

_SWITCH = click.Choice(("enable", "disable"))
_EXTRA = "phireg.build.extra"


class _PassingOn(Command):
    """A command whose arguments after ``--`` go to another program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            end = args.index("--")
            ctx.meta[_EXTRA] = tuple(args[end + 1 :])
            args = args[:end]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- FLAGS]"]


_BACKENDS = ("auto", "tensorrt-llm", "tensorrt", "tensorrt-rtx")


@documented(
    "phireg build ckpt --output-dir engine --max-seq-len 2048",
    "phireg build ckpt --output-dir engine --print-command --trtllm-version 1.2.1",
    cls=_PassingOn,
    waits="reading the checkpoint",
)
@options.checkpoint_argument("checkpoint_dir", "[CKPT]", required=False)
@options.output_dir_option("engine")
@ENGINE.option(
    "--backend",
    type=click.Choice(_BACKENDS),
    default="auto",
    help="Who builds: auto is TensorRT-LLM, or else TensorRT, or else TensorRT for RTX, whichever "
    "is there and can.",
)
@ENGINE.option(
    "--gpu",
    metavar="SM,...",
    help="TensorRT for RTX: compute capabilities, e.g. sm89,sm120; by default the GPU's here, or "
    "all.",
)
@ENGINE.option(
    "--weights",
    type=click.Choice(("embedded", "separate")),
    help="Without TensorRT-LLM: in the engine (the default), or fed to it when it runs.",
)
@ENGINE.option("--max-batch-size", type=options.COUNT, help="Rows of a batch at most.")
@ENGINE.option("--max-input-len", type=options.COUNT, help="Tokens of a prompt at most.")
@ENGINE.option(
    *("--max-new-tokens", "max_output_len"),
    aliases=("--max-output-len",),
    type=options.COUNT,
    help="New tokens at most.",
)
@ENGINE.option("--max-seq-len", type=options.COUNT, help="Tokens of both together at most.")
@ENGINE.option(
    "--gemm-plugin",
    type=click.Choice(("auto", *WEIGHT_DTYPES, "fp8", "disable")),
    help="auto is the checkpoint's dtype.",
)
@ENGINE.option(
    "--gpt-attention-plugin",
    type=click.Choice(("auto", *WEIGHT_DTYPES, "disable")),
    help="auto is the checkpoint's dtype.",
)
@ENGINE.option("--context-fmha", type=_SWITCH, help="Fused attention for prompts.")
@ENGINE.option("--context-fmha-fp32-acc", type=_SWITCH, help="float32 accumulation in it.")
@ENGINE.option("--use-fp8-context-fmha", type=_SWITCH, help="FP8 arithmetic in it.")
@RUNNING.option("--workers", type=options.COUNT, help="Ranks built side by side, a GPU each.")
@RANKS.option("--tp-size", type=options.COUNT, help="Ranks, with --dummy-weights.")
@RANKS.option(
    "--pp-size", type=options.COUNT, help="Pipeline stages; only 1 is possible.", rare=True
)
@MODEL.option(
    "--dummy-weights", is_flag=True, help="Build without weights, from a config.json alone."
)
@MODEL.option(
    "--model-dir",
    type=options.Directory(),
    help="With --dummy-weights: where the model's config.json is.",
)
@MODEL.option(
    "--family",
    type=options.PluginName("families", "auto"),
    help="With --dummy-weights: as for convert.",
)
@MODEL.option("--dtype", type=options.Dtype("auto"), help="With --dummy-weights.")
@options.overwrite_option("engine")
@OUTPUT.option("--print-command", is_flag=True, help="Show what would run, and do not run it.")
@OUTPUT.option(
    "--trtllm-version",
    metavar="V",
    help="With --print-command: for this release instead of the installed one.",
)
@options.quiet_option("No output of the builder and no summary.")
@options.json_option
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Build an engine from the checkpoint in CKPT.

    TensorRT-LLM builds it if it is installed, else TensorRT or TensorRT for RTX, which needs no
    GPU to build. The options are the same for every release; FLAGS after -- go to trtllm-build as
    they are.
    """
    print_command, version = options.pop("print_command"), options.pop("trtllm_version")
    if version and not print_command:
        raise UsageError(
            f"--trtllm-version {version} only shows a command",
            hint="add --print-command, or leave it out: the installed release is found out.",
        )
    overwrite, quiet, as_json = (options.pop(key) for key in ("overwrite", "quiet", "as_json"))
    backend = options["backend"]
    try:
        plan = _plan(version, ctx.meta.get(_EXTRA, ()), options)
    except EngineError as error:
        if not print_command or version or backend != "tensorrt-llm":
            raise
        from phireg.trtllm.releases import NEWEST

        hint = f"name the release to show it for: --trtllm-version {NEWEST}; or {error.hint}"
        raise EngineError(error.message, hint=hint) from None
    from phireg.trtllm.build import BuildPlan

    with_trtllm = isinstance(plan, BuildPlan)
    if not as_json and (print_command or not quiet):
        for note in plan.command.notes if with_trtllm else plan.notes:
            warn(note, label="note: ")
    built: Any = None
    if not print_command:
        unwritten = f"no engine was written; the builder's output is in {plan.log}"
        ranks = plan.command.tp_size if with_trtllm else plan.spec.tp_size
        display = (_display if with_trtllm else engines.build_progress)(ranks, quiet=quiet)
        with interruptible(plan.output_dir, lambda: unwritten), display as listen:
            built = phireg.build(plan, overwrite=overwrite, listen=listen)
    if as_json:
        emit_json(engines.plan_document(plan, built))
    elif print_command:
        emit(shlex.join(plan.line) if with_trtllm else engines.plan_text(plan))
    elif not quiet:
        emit((_text if with_trtllm else engines.built_text)(plan, built))


def _plan(version: str | None, extra: tuple[str, ...], options: dict[str, Any]) -> Any:
    """Return the BuildPlan or EnginePlan that the options ask for."""
    from phireg.tensorrt.plan import parse_gpus

    backend, gpu, weights = (options.pop(name) for name in ("backend", "gpu", "weights"))
    for name in ("context_fmha", "context_fmha_fp32_acc", "use_fp8_context_fmha"):
        options[name] = None if options[name] is None else options[name] == "enable"
    source, output_dir = options.pop("checkpoint_dir"), options.pop("output_dir")
    dummy_weights = options.pop("dummy_weights")
    model = {name: options.pop(name) for name in ("model_dir", "family", "dtype")}
    if dummy_weights:
        if source is not None or model["model_dir"] is None:
            raise UsageError(
                "--dummy-weights builds from --model-dir, without a checkpoint",
                hint="phireg build --dummy-weights --model-dir DIR --output-dir ENGINE",
            )
        source = model["model_dir"]
    elif names := [name for name, value in model.items() if value is not None]:
        option = f"--{names[0].replace('_', '-')}"
        raise UsageError(
            f"{option} is for --dummy-weights; a checkpoint says for itself what it is",
            hint=f"leave out {option}, or add --dummy-weights.",
        )
    if source is None:
        raise UsageError(
            "there is no checkpoint to build from",
            hint="phireg build CKPT --output-dir ENGINE; phireg convert makes checkpoints. Without "
            "weights: --dummy-weights --model-dir DIR, from DIR's config.json alone.",
        )
    return phireg.plan_build(
        source,
        output_dir,
        phireg.BuildOptions(
            **options,
            extra=extra,
            gpus=parse_gpus(gpu) if gpu else (),
            weights=weights or "embedded",
        ),
        backend=backend,
        dummy_weights=dummy_weights,
        family=model["family"] or "auto",
        dtype=model["dtype"] or "auto",
        version=version,
    )


@contextmanager
def _display(ranks: int, *, quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """Pass the builder's lines on to stderr; on a terminal a line below names the stage."""
    if quiet:
        yield None
        return
    with ProgressBars() as bars:
        bars.spinner("reading the checkpoint")

        def listen(line: str) -> None:
            # A spinner redirects sys.stderr, and stays below what is printed.
            click.echo(printable(line), file=sys.stderr)
            if "Build TensorRT engine" in line:
                bars.spinner("building")
            elif match := re.search(r"Serializing engine to .*rank(\d+)\.engine", line):
                bars.spinner(f"writing rank engine {int(match[1]) + 1} of {ranks}")

        yield listen


def _text(plan: BuildPlan, built: Built) -> str:
    engine = built.engine
    limits = f"batches of {engine.max_batch_size}, prompts of {engine.max_input_len} tokens, "
    rows = [
        ("engine", str(plan.output_dir)),
        ("release", f"TensorRT-LLM {engine.version}"),
        ("model", f"{engine.architecture}, {engine.dtype}"),
        ("up to", f"{limits}{engine.max_seq_len} with their continuation"),
        *([("a step", f"{engine.max_num_tokens} tokens")] if engine.max_num_tokens else []),
        ("files", f"{counted(engine.world_size, 'rank')}, {size(sum(built.files.values()))}"),
        ("log", str(built.log)),
        ("time", f"{built.seconds:.1f} s"),
    ]
    return columns(rows)
