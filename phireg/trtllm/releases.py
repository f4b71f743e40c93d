"""TensorRT-LLM's releases, as far as their builders differ for Phi.

Facts are from the argument parser of ``trtllm-build`` and the release notes of each release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from phireg.errors import EngineError, UsageError

NEWEST = "1.2.1"
"""The newest final release with the engine backend."""
LAST = "1.3.0rc20"
"""The last version of all with the engine backend; the next one has no ``trtllm-build``."""
INSTALL = f"pip install tensorrt_llm=={NEWEST}"


@dataclass(frozen=True, slots=True)
class Release:
    """A range of releases whose builders take the same flags, up to the next range's first."""

    name: str
    first: Version
    # --max_seq_len limits prompt and new tokens together; earlier --max_output_len the new ones.
    max_seq_len: bool = True
    # --context_fmha_fp32_acc exists; later it is an option of the runtime.
    fp32_acc_flag: bool = False
    # Plugins take "auto", the checkpoint's dtype, and it is the default of the attention plugin;
    # before, that was float16.
    auto_plugin: bool = True
    fp8_gemm: bool = True  # --gemm_plugin fp8 exists
    # The default of --max_num_tokens, the tokens of a step, which a whole prompt is one of; None
    # is as many as batch and prompt are long.
    max_num_tokens: int | None = 8192


_EARLY: dict[str, Any] = {
    "max_seq_len": False,
    "fp32_acc_flag": True,
    "fp8_gemm": False,
    "max_num_tokens": None,
}
RELEASES = (
    Release("0.10", Version("0.10.0.dev0"), auto_plugin=False, **_EARLY),
    # The commit of the original guide: nearly 0.10's flags, and the first to read Phi-3-small.
    Release("0.11 of 2024-06-04", Version("0.11.0.dev2024060400"), **_EARLY),
    Release("0.11", Version("0.11.0.dev2024060401"), fp32_acc_flag=True),
    Release(f"0.12 to {LAST}", Version("0.12.0.dev0")),
)
"""Oldest first."""


def public_version(version: str) -> Version:
    """Parse a version without its local part, e.g. 1.2.1 of ``1.2.1+cu13``."""
    try:
        return Version(Version(version).public)
    except (InvalidVersion, ValueError):  # or more digits than Python converts
        raise UsageError(
            f"'{version}' is not a version of TensorRT-LLM", hint=f"for example {NEWEST}."
        ) from None


def release_of(version: str) -> Release:
    """Return the range of a version; an EngineError if it cannot build Phi checkpoints."""
    public = public_version(version)
    if public < RELEASES[0].first:
        raise EngineError(
            f"TensorRT-LLM {version} is too old: Phi checkpoints of this form are read since 0.10",
            hint=f"install a newer one: {INSTALL}",
        )
    if public > Version(LAST):
        raise EngineError(
            f"TensorRT-LLM {version} has no engine backend: trtllm-build was removed after {LAST}",
            hint=f"install a release that has it: {INSTALL}",
        )
    return [release for release in RELEASES if release.first <= public][-1]
