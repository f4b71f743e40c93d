"""The part of ``tensorrt_llm.runtime`` that is used, in the releases that have it.

Its documented classes are ModelRunnerCpp, which needs an engine for in-flight batching (attention
plugin, packed input, paged KV cache), and ModelRunner. Nothing else of TensorRT-LLM is imported
here, and that late: it takes long, and prints to standard output.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from torch import Tensor

from phireg.errors import CheckError, PhiregError
from phireg.trtllm.engine import Engine

Output = Mapping[str, Any]
"""``output_ids`` int32 [batch, beams, length], prompts included, padded at the end;
``sequence_lengths`` int32 [batch, beams]; ``context_logits``, if the engine gathers them: for each
row [tokens of the prompt, vocab_size or more]."""

_LOG_LEVEL = "TLLM_LOG_LEVEL"


class Runner(Protocol):
    """An engine that is loaded."""

    def generate(self, batch_input_ids: Sequence[Tensor], **options: Any) -> Any:
        """An ``Output``; with ``streaming=True`` an iterator of them, each up to one more token.

        Ranks other than 0 may get something else.
        """


def installed() -> str:
    """The installed release.

    Raises:
        PhiregError: there is none.
    """
    try:
        return version("tensorrt_llm")
    except PackageNotFoundError:
        raise PhiregError(
            "TensorRT-LLM is not installed, and an engine runs on nothing else",
            hint="pip install 'phireg[trtllm]' on a machine with a GPU (phireg doctor), or run the "
            "checkpoint that the engine was built from: --backend executor.",
        ) from None


def release_number(release: str) -> tuple[int, int]:
    """``(0, 12)`` of ``0.12.0.dev2024``."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def load_runner(engine: Engine, release: str, rank: int) -> Runner:
    """Load this rank's part of an engine.

    Args:
        engine: what its config.json says; the runtime is told its run options.
        release: that is installed.
        rank: of this process.

    Raises:
        PhiregError: the installed release has no runtime for engines.
        CheckError: the runtime refuses the engine.
    """
    # Upstream's scripts show errors only; what is set already, stays.
    os.environ.setdefault(_LOG_LEVEL, "ERROR")
    with quiet_stdout():
        kind = _runner_class(release, in_flight_batching(engine))
        try:
            runner: Runner = kind.from_dir(
                engine_dir=str(engine.directory), rank=rank, **engine.run_options
            )
        except Exception as error:  # which classes it raises is not documented
            other = f" (built by {engine.version})" if engine.version != release else ""
            raise CheckError(
                f"TensorRT-LLM {release} cannot load {engine.directory}{other}: "
                f"{type(error).__name__}: {error}",
                hint="an engine runs on the release and the kind of GPU that it was built with; "
                "build it again: phireg build CKPT --output-dir ENGINE",
            ) from None
    return runner


def _runner_class(release: str, in_flight: bool) -> Any:
    try:
        runtime: Any = import_module("tensorrt_llm.runtime")
    except Exception as error:  # a missing driver or library shows in any way
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt_llm.runtime":
            raise _without_engines(release) from None
        raise PhiregError(
            f"TensorRT-LLM {release} cannot be imported: {type(error).__name__}: {error}",
            hint="phireg doctor says what is missing.",
        ) from None
    names = ("ModelRunnerCpp", "ModelRunner") if in_flight else ("ModelRunner",)
    kinds = [getattr(runtime, name) for name in names if hasattr(runtime, name)]
    if not kinds:
        raise _without_engines(release)
    return kinds[0]


def in_flight_batching(engine: Engine) -> bool:
    """Whether ModelRunnerCpp takes the engine.

    It needs the attention plugin, packed input and a paged KV cache; the last is an option of the
    plugins up to 0.13 and ``kv_cache_type`` of the build since.
    """
    plugins = engine.build_config.get("plugin_config")
    plugins = plugins if isinstance(plugins, Mapping) else {}
    kind = engine.build_config.get("kv_cache_type")
    paged = plugins.get("paged_kv_cache") if kind is None else str(kind).lower() == "paged"
    packed = plugins.get("remove_input_padding")
    return bool(plugins.get("gpt_attention_plugin") and packed and paged)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what the runtime prints, C++ included, to standard error: standard output is ours."""
    if sys.stdout is not None:
        sys.stdout.flush()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            kept = os.dup(1)
        except OSError:
            pass  # closed: nothing can get there
        else:
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        yield


def _without_engines(release: str) -> PhiregError:
    return PhiregError(
        f"TensorRT-LLM {release} has no runtime for engines; 1.3.0rc20 was the last with one",
        hint="pip install 'phireg[trtllm]' installs a release that has it.",
    )
