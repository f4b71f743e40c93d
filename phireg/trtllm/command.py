"""Translate one stable set of options into the flags of one release of ``trtllm-build``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from phireg.errors import EngineError, UsageError
from phireg.reader.architectures import ARCHITECTURES
from phireg.reader.config import Config
from phireg.trtllm.releases import Release, public_version, release_of

PROGRAM = "trtllm-build"

FP32_ACCUMULATION = "enable_context_fmha_fp32_acc"
"""A run option: accumulate in float32 in the fused attention of the context phase."""

_MAX_INPUT_LEN = 1024
"""The builder's default in every release."""

_OWN_FLAGS = (
    "checkpoint_dir", "model_config", "output_dir", "max_batch_size", "max_input_len",
    "max_output_len", "max_seq_len", "max_decoder_seq_len", "tp_size", "pp_size", "gemm_plugin",
    "gpt_attention_plugin", "context_fmha", "context_fmha_fp32_acc", "use_fp8_context_fmha",
    "workers",
)  # fmt: skip
"""Flags that phireg decides, which a user may therefore not pass beside it."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of an engine; None leaves them to the builder or to phireg.

    Lengths are limits in tokens; the plugins take "auto", a dtype or "disable".
    """

    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None  # of new tokens; not together with max_seq_len
    max_seq_len: int | None = None  # of prompt and continuation together
    gemm_plugin: str | None = None  # also "fp8"
    gpt_attention_plugin: str | None = None
    context_fmha: bool | None = None  # fused attention in the context phase
    context_fmha_fp32_acc: bool | None = None  # float32 accumulation in it
    use_fp8_context_fmha: bool | None = None  # FP8 arithmetic in it
    workers: int | None = None  # ranks built side by side, each on a GPU of its own
    tp_size: int | None = None  # tensor-parallel ranks, where they are not the checkpoint's
    pp_size: int | None = None  # pipeline stages; the checkpoint's
    extra: tuple[str, ...] = ()  # further arguments of trtllm-build, passed on as they are
    gpus: tuple[str, ...] = ()  # TensorRT for RTX compiles for ("sm89"); empty: as they are here
    weights: Literal["embedded", "separate"] = "embedded"  # or inputs, fed when the engine runs


@dataclass(frozen=True, slots=True)
class Command:
    """The builder's arguments, without its input and output."""

    flags: tuple[str, ...]  # in the order of the builder's help, extra arguments last
    notes: tuple[str, ...]  # settings that phireg chose, and why
    run_options: Mapping[str, bool]  # for the runtime; see Engine.run_options
    tp_size: int

    def line(self, program: str | Path, source: Path, output_dir: Path) -> tuple[str, ...]:
        """Return the whole command; ``source`` is a checkpoint, or a config.json for no weights."""
        if source.suffix == ".json" and not source.is_dir():
            reads = ("--model_config", str(source))
        else:
            # A path that ends with ".json" is a config to the builder, even if it is a directory.
            reads = ("--checkpoint_dir", str(source) + "/" * (source.suffix == ".json"))
        return (str(program), *reads, "--output_dir", str(output_dir), *self.flags)


def translate(
    config: Mapping[str, Any], options: BuildOptions, version: str, *, weights: bool = True
) -> Command:
    """Choose a release's flags; ``config`` is the checkpoint's, ``weights``: it has rank files."""
    _check_extra(options.extra)
    for option, value in (("--gpu", options.gpus), ("--weights separate", options.weights)):
        if value not in ((), "embedded"):
            raise UsageError(
                f"{option} is for engines that phireg builds itself",
                hint="leave it out, or take --backend tensorrt-rtx.",
            )
    release = release_of(version)
    _check_model(config, version)
    return _Translation(config, options, release).command(weights)


class _Translation:
    def __init__(self, config: Mapping[str, Any], options: BuildOptions, release: Release) -> None:
        self.config = config
        self.architecture = ARCHITECTURES.get(config["architecture"])
        self.options = options
        self.release = release
        self.notes: list[str] = []
        self.flags: list[str] = []
        self.run_options: dict[str, bool] = {}

    def command(self, weights: bool) -> Command:
        options = self.options
        self.add("max_batch_size", options.max_batch_size)
        self.lengths()
        tp_size = self.ranks(weights)
        for name in ("gemm_plugin", "gpt_attention_plugin"):
            self.plugin(name)
        self.context_attention()
        self.add("workers", options.workers)
        flags = (*self.flags, *options.extra)
        return Command(flags, tuple(self.notes), self.run_options, tp_size)

    def add(self, flag: str, value: object) -> None:
        if isinstance(value, bool):
            value = "enable" if value else "disable"
        if value is not None:
            self.flags += (f"--{flag}", str(value))

    def lengths(self) -> None:
        options = self.options
        by_default = 0 if self.release.max_seq_len else _MAX_INPUT_LEN
        total = check_lengths(options, self.positions(), by_default)
        self.add("max_input_len", options.max_input_len)
        if self.release.max_seq_len:
            self.add("max_seq_len", total)
        elif total:
            self.add("max_output_len", total - (options.max_input_len or by_default))
        self.step_tokens(options.max_input_len or 0)

    def step_tokens(self, prompt: int) -> None:
        """Let one step take the longest prompt: it is not cut into parts."""
        by_default = self.release.max_num_tokens
        given = any(_flag(argument) == "max_num_tokens" for argument in self.options.extra)
        if by_default is None or prompt <= by_default or given:
            return
        self.add("max_num_tokens", prompt)
        self.notes.append(
            f"--max_num_tokens {prompt} is set, since a step takes a whole prompt; the builder's "
            f"default is {by_default}"
        )

    def ranks(self, weights: bool) -> int:
        options = self.options
        mapping = self.config.get("mapping") or {}
        tp_size, pp_size = mapping.get("tp_size") or 1, mapping.get("pp_size") or 1
        check_stages(options, pp_size)
        split_until = self.architecture.split_until if self.architecture else None
        if split_until and self.release.first < Version(split_until):
            if weights and tp_size > 1:
                raise EngineError(
                    f"TensorRT-LLM {self.release.name} splits this model itself, and the "
                    f"checkpoint is already split for {tp_size} ranks",
                    hint="convert with --tp-size 1 and give this command --tp-size "
                    f"{tp_size}; or use release {Version(split_until).base_version} or later.",
                )
            ranks = int(options.tp_size or tp_size)
            if ranks > 1:
                self.add("tp_size", ranks)
                self.add("pp_size", 1)
            return ranks
        check_ranks(options, tp_size)
        return int(tp_size)

    def plugin(self, name: str) -> None:
        value: str | None = getattr(self.options, name)
        dtype = self.config["dtype"]
        option = _option(name)
        if value == "fp8":
            self.check_fp8(f"{option} fp8")
            if not self.release.fp8_gemm:
                raise EngineError(
                    f"TensorRT-LLM {self.release.name} has no {option} fp8",
                    hint=f"use {option} disable, or release 0.11 or later.",
                )
        elif value not in (None, "auto", "disable", dtype):
            raise UsageError(
                f"{option} {value}: the checkpoint is {dtype}, which a {value} plugin cannot take",
                hint=f"use {option} auto, which is the checkpoint's dtype.",
            )
        by_default = value is None and name == "gpt_attention_plugin"
        if not self.release.auto_plugin and (value == "auto" or by_default):
            value = dtype
        self.add(name, value)

    def context_attention(self) -> None:
        options = self.options
        fused = options.context_fmha
        accumulate, fp8 = options.context_fmha_fp32_acc, options.use_fp8_context_fmha
        switches = {"context_fmha_fp32_acc": accumulate, "use_fp8_context_fmha": fp8}
        enabled = " and ".join(_option(name) for name, value in switches.items() if value)
        if fused is False and enabled:
            raise UsageError(
                f"{enabled}: fused context attention is disabled",
                hint="leave out --context-fmha disable.",
            )
        if fp8:
            self.check_fp8("--use-fp8-context-fmha")
        if options.gpt_attention_plugin == "disable" and (fused or enabled):
            raise UsageError(
                "fused context attention is part of the attention plugin, which is disabled",
                hint="leave out --gpt-attention-plugin disable.",
            )
        limit = self.dense_tokens()
        if fused is None and limit is not None and self.longest_prompt() > limit:
            fused = False
            self.notes.append(
                f"--context_fmha disable is set: with prompts over {limit} tokens, which this "
                "engine takes, the fused context attention ignores Phi-3-small's block sparsity; "
                "--context-fmha enable keeps it"
            )
            if enabled:
                accumulate = fp8 = None
                self.notes.append(f"{enabled} has no effect without it")
        self.add("context_fmha", fused)
        if self.release.fp32_acc_flag:
            self.add("context_fmha_fp32_acc", accumulate)
        elif accumulate is not None:
            self.run_options[FP32_ACCUMULATION] = accumulate
            self.notes.append(
                "--context-fmha-fp32-acc is a run-time option since 0.12: it is remembered for "
                "phireg run and phireg summarize"
            )
        self.add("use_fp8_context_fmha", fp8)

    def longest_prompt(self) -> int:
        """Return the longest prompt; since 0.11 ``max_input_len`` does not limit packed ones."""
        if not self.release.max_seq_len:
            return self.options.max_input_len or _MAX_INPUT_LEN
        return (total_length(self.options) or self.positions()) - 1

    def positions(self) -> int:
        return Config(self.config).integer("max_position_embeddings")

    def dense_tokens(self) -> int | None:
        """Return the number of tokens up to which block-sparse attention equals dense.

        Phi-3-small attends to the blocks nearby and to some of the others; layer i is dense if
        i + 1 is a multiple of ``dense_attention_every_n_layers``.
        """
        sparse = self.architecture is not None and self.architecture.block_sparse
        if not sparse or self.config["dense_attention_every_n_layers"] == 1:
            return None
        blocks, size = "blocksparse_num_local_blocks", "blocksparse_block_size"
        return int(self.config[blocks] * self.config[size])

    def check_fp8(self, option: str) -> None:
        quantization = self.config.get("quantization") or {}
        if quantization.get("quant_algo") != "FP8":
            raise UsageError(
                f"{option} needs an FP8 checkpoint", hint="phireg quantize --qformat fp8 makes one."
            )


def check_stages(options: BuildOptions, pp_size: int) -> None:
    """Refuse another number of pipeline stages than the checkpoint's."""
    if options.pp_size not in (None, pp_size):
        raise UsageError(
            f"--pp-size {options.pp_size}: the checkpoint has {pp_size} pipeline stage",
            hint="Phi models have no pipeline stages; use --tp-size when converting.",
        )


def check_ranks(options: BuildOptions, tp_size: int) -> None:
    """Refuse another number of ranks than the checkpoint's."""
    if options.tp_size not in (None, tp_size):
        raise UsageError(
            f"--tp-size {options.tp_size}: the checkpoint is split for {tp_size}",
            hint="the number of ranks is decided when converting: phireg convert --tp-size "
            f"{options.tp_size}.",
        )


def total_length(options: BuildOptions) -> int | None:
    """Return the limit of prompt and continuation together, in tokens, if there is one."""
    if options.max_output_len:
        return (options.max_input_len or _MAX_INPUT_LEN) + options.max_output_len
    return options.max_seq_len


def check_lengths(options: BuildOptions, positions: int, by_default: int) -> int | None:
    """Return ``total_length``; refuse limits that contradict each other or the model."""
    if options.max_output_len and options.max_seq_len:
        raise UsageError(
            "--max-new-tokens and --max-seq-len are two ways to say the same",
            hint="--max-seq-len counts the prompt, --max-new-tokens does not.",
        )
    total = total_length(options)
    if (total or options.max_input_len or 0) > positions:
        raise UsageError(
            f"{total or options.max_input_len} tokens are more than the {positions} positions "
            "of the model",
            hint="--max-seq-len, or --max-input-len and --max-new-tokens together, must fit.",
        )
    prompt = options.max_input_len or by_default
    if total and prompt >= total:
        raise UsageError(
            f"a prompt of {prompt} tokens leaves no room for new ones in {total}",
            hint="lower --max-input-len or raise --max-seq-len.",
        )
    return total


def _option(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"


def _check_model(config: Mapping[str, Any], version: str) -> None:
    """Refuse a model that the release's reader does not know."""
    row = ARCHITECTURES.get(config["architecture"])
    if row is None:
        return
    heads = config["num_attention_heads"]
    grouped = config.get("num_key_value_heads", heads) != heads
    first = Version((grouped and row.grouped_since) or row.since)
    if public_version(version) < first:
        raise EngineError(
            f"TensorRT-LLM {version} cannot read this model: {row.name}"
            f"{' with grouped key/value heads' if grouped else ''} needs "
            f"{first.major}.{first.minor} or later",
            hint="use a newer release.",
        )


def _flag(argument: str) -> str | None:
    """Return the name of a flag, as the builder spells it; None for a value."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument[:2] == "--" else None


def _check_extra(extra: Sequence[str]) -> None:
    """Refuse flags that phireg sets itself; the builder's parser takes abbreviations, too."""
    for argument in extra:
        flag = _flag(argument)
        for own in _OWN_FLAGS:
            if flag is not None and own.startswith(flag):
                raise UsageError(
                    f"--{flag} cannot be passed on after '--': phireg decides --{own}",
                    hint="give CKPT, or --dummy-weights with --model-dir."
                    if own in ("checkpoint_dir", "model_config")
                    else f"give phireg's own option {_option(own.replace('decoder_', ''))}.",
                )
