"""What a failed build's output says, and what to do about failures that are known."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 12
"""Lines of a failed build that are repeated."""

_TELLING = re.compile(
    r"\[E\]|\[ERROR\]|\b\w*(Error|Exception)\b|Traceback|assert|error:|Assertion failed|Killed"
)
_UNHELPFUL = re.compile(r"please check (the )?error log|^\s*\^+\s*$|TypeError: a bytes-like object")


@dataclass(frozen=True, slots=True)
class Failure:
    """A known kind of failure.

    Attributes:
        name: one word or two.
        pattern: what the output has then.
        advice: what to do.
    """

    name: str
    pattern: re.Pattern[str]
    advice: str


def _failure(name: str, pattern: str, advice: str) -> Failure:
    return Failure(name, re.compile(pattern), advice)


KNOWN = (
    _failure(
        "unknown option",
        r"trtllm-build: error: .*(unrecognized arguments|invalid choice|expected one argument)",
        "this release does not know an argument after '--'; trtllm-build --help lists those it "
        "knows.",
    ),
    _failure(
        "missing tensor",
        r"Required but not provided|assert os\.path\.isfile|Provided tensor names are different",
        "the checkpoint lacks what this release reads: run phireg verify on it with --model-dir, "
        "and convert again with this phireg.",
    ),
    _failure(
        "shape",
        r"The value updated is not the same shape as the original",
        "the checkpoint's config.json and tensors do not fit together for this release: run phireg "
        "verify on it with --model-dir, and convert again with this phireg.",
    ),
    _failure(
        "model",
        r"Unsupported model architecture",
        "this release does not know the checkpoint's architecture; use a newer one (phireg doctor "
        "names one).",
    ),
    _failure(
        "dtype",
        r"could not find any supported formats consistent with input/output data types"
        r"|precision has been set for a layer or layer output, but \w+ is not configured"
        r"|expects values in|Mismatched (data )?types?|strongly typed.*(type|cast)",
        "the plugins' dtype is not the checkpoint's: use --gemm-plugin auto and "
        "--gpt-attention-plugin auto, or convert again with the --dtype they have.",
    ),
    _failure(
        "unsupported GPU",
        r"(?i)unsupported arch|no kernel image is available|is not supported on SM"
        r"|unsupported SM|is only supported on (Ada|Hopper|Blackwell)|not supported on this GPU",
        "this release has no kernels for the GPU, or none for this quantization: Volta needs 0.14 "
        "or older, Blackwell 0.17 or newer and neither INT8 nor INT4, FP8 Ada or Hopper at least.",
    ),
    _failure(
        "no GPU",
        r"No CUDA GPUs are available|Found no NVIDIA driver|max_workers must be greater than 0"
        r"|CUDA driver version is insufficient|no CUDA-capable device"
        r"|libcuda\.so\S*: cannot open|CUDA initialization",
        "the builder needs a GPU and a driver that fits its CUDA; phireg doctor says what is "
        "there.",
    ),
    _failure(
        "MPI",
        r"libmpi\S*: cannot open|cannot load MPI library|No module named 'mpi4py'",
        "the builder needs the MPI library even for one GPU: apt-get install libopenmpi-dev "
        "openmpi-bin.",
    ),
    _failure(
        "broken installation",
        r"cannot open shared object file|undefined symbol|No module named '(tensorrt|torch)"
        r"|ImportError: ",
        "TensorRT-LLM's installation is not complete; phireg doctor says what is missing.",
    ),
    _failure(
        "disk full",
        r"No space left on device|Errno 28\b",
        "the disk is full; an engine is about as large as its checkpoint.",
    ),
    _failure(
        "out of memory",
        r"Error Code \d+: OutOfMemory|CUDA out of memory|CUDA error: out of memory"
        r"|cudaErrorMemoryAllocation|of scratch space, but only|MemoryError|std::bad_alloc"
        r"|Cannot allocate memory",
        "make the engine smaller: lower --max-batch-size and --max-seq-len, pass '-- "
        "--max_num_tokens 2048', use --workers 1, end other programs on the GPU; or convert for "
        "more ranks.",
    ),
)
"""In the order in which they are looked for: what explains others comes first."""

_KILLED = Failure(
    "out of main memory",
    re.compile(""),
    "the system killed it, as it does when main memory runs out: use --workers 1, or a machine "
    "with more memory (the weights are loaded into it).",
)


def known_failure(lines: Sequence[str], exit_code: int) -> Failure | None:
    """Which known failure a build's output shows.

    Args:
        lines: the last lines of the output.
        exit_code: negative for a signal.
    """
    text = "\n".join(lines)
    for failure in KNOWN:
        if failure.pattern.search(text):
            return failure
    return _KILLED if exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL) else None


def last_lines(lines: Sequence[str]) -> list[str]:
    """The lines that tell most about a failure, in their order: errors, else the last ones."""
    telling = [line for line in lines if _TELLING.search(line) and not _UNHELPFUL.search(line)] or [
        line for line in lines if line.strip()
    ]
    shown: list[str] = []
    for line in telling:
        if line not in shown:
            shown.append(line)
    return shown[-SHOWN:]
