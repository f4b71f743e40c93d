"""Load an engine with ``tensorrt_llm.runtime``, in the releases that have it.

Its documented classes are ModelRunnerCpp, which needs an engine for in-flight batching (attention
plugin, packed input, paged KV cache), and ModelRunner. TensorRT-LLM is imported late: that takes
long, and prints to standard output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from phireg.errors import CheckError, PhiregError
from phireg.trtllm.builder import installed_version
from phireg.trtllm.engine import Engine
from phireg.trtllm.releases import LAST

Output = Mapping[str, Any]
"""``output_ids`` int32 [batch, beams, length], prompts included, padded at the end;
``sequence_lengths`` int32 [batch, beams]; ``context_logits``, if the engine gathers them: for each
row [tokens of the prompt, vocab_size or more]."""


class Runner(Protocol):
    """The part of TensorRT-LLM's runners that is used."""

    def generate(self, batch_input_ids: Sequence[Tensor], **options: Any) -> Any:
        """An ``Output``; with ``streaming=True`` an iterator of them, each up to one more token.

        Ranks other than 0 may get something else.
        """


def installed() -> str:
    """The installed release; an error if there is none."""
    version = installed_version()
    if version is None:
        raise PhiregError(
            "TensorRT-LLM is not installed, and an engine runs on nothing else",
            hint="pip install 'phireg[trtllm]' on a machine with a GPU (phireg doctor), or run the "
            "checkpoint that the engine was built from: --backend executor.",
        )
    return version


def load_runner(engine: Engine, release: str, rank: int) -> Runner:
    """Load this rank's part of an engine with the installed release."""
    # Errors only, as in TensorRT-LLM's scripts, unless the user has set it.
    os.environ.setdefault("TLLM_LOG_LEVEL", "ERROR")
    with quiet_stdout():
        runner_class = _runner_class(release, in_flight_batching(engine))
        try:
            runner: Runner = runner_class.from_dir(
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
    classes = [getattr(runtime, name) for name in names if hasattr(runtime, name)]
    if not classes:
        raise _without_engines(release)
    return classes[0]


def in_flight_batching(engine: Engine) -> bool:
    """Whether ModelRunnerCpp takes the engine.

    It needs the attention plugin, packed input and a paged KV cache; the last is an option of the
    plugins up to 0.13 and ``kv_cache_type`` of the build since.
    """
    plugins = engine.build_config.get("plugin_config")
    plugins = plugins if isinstance(plugins, Mapping) else {}
    cache = engine.build_config.get("kv_cache_type")
    paged = plugins.get("paged_kv_cache") if cache is None else str(cache).lower() == "paged"
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
            stdout = os.dup(1)
        except OSError:
            pass  # closed: nothing can get there
        else:
            stack.callback(os.close, stdout)
            stack.callback(os.dup2, stdout, 1)
            os.dup2(2, 1)
        yield


def _without_engines(release: str) -> PhiregError:
    return PhiregError(
        f"TensorRT-LLM {release} has no runtime for engines; {LAST} was the last with one",
        hint="pip install 'phireg[trtllm]' installs a release that has it.",
    )
