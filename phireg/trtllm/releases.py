"""TensorRT-LLM's releases, as far as their builders differ for Phi.

The table is data: which flags ``trtllm-build`` has and what its reader takes. Facts are from the
builder's argument parser and the release notes of each release.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from phireg.errors import EngineError, UsageError

NEWEST = "1.2.1"
"""The newest final release with the engine backend."""
LAST = "1.3.0rc20"
"""The last version of all with the engine backend; the next one has no ``trtllm-build``."""
INSTALL = f"pip install tensorrt_llm=={NEWEST}"

PHI2, PHI3, PHI3_SMALL = "PhiForCausalLM", "Phi3ForCausalLM", "Phi3SmallForCausalLM"
PHI_MOE = "PhiMoEForCausalLM"
READ_EXPERTS_SINCE = Version("0.14.0.dev0")
"""The first release whose Phi-3 reader has experts."""


@dataclass(frozen=True, slots=True)
class Release:
    """A line of releases whose builders take the same flags.

    Attributes:
        name: what it is called here.
        since: its first version; it goes up to the next line's first.
        limits_sum: ``--max_seq_len`` limits prompt and new tokens together; earlier
            ``--max_output_len`` limits the new ones.
        ranks_by_flag: ``--tp_size`` and ``--pp_size`` exist. They decide for phi-2, whose reader
            then splits an unsplit ``rank0.safetensors``; for others config.json decides.
        fp32_at_build: ``--context_fmha_fp32_acc`` exists; later the runtime is told.
        auto_plugin: plugins take ``auto``, the checkpoint's dtype, and it is the attention
            plugin's default; before, that was float16.
        fp8_gemm: ``--gemm_plugin fp8`` exists.
        grouped: reads Phi-3 models with fewer key-value heads than heads, and Phi-3-small.
    """

    name: str
    since: Version
    limits_sum: bool
    ranks_by_flag: bool
    fp32_at_build: bool
    auto_plugin: bool
    fp8_gemm: bool
    grouped: bool


def _table() -> tuple[Release, ...]:
    yes, no = True, False
    # The guide's commit of 2024-06-04 calls itself 0.11.0.dev2024060400: nearly 0.10's flags, and
    # the first to read Phi-3-small.
    rows: tuple[tuple[str, str, bool, bool, bool, bool, bool, bool], ...] = (
        #                                              sum  ranks fp32 auto fp8  grouped
        ("0.10", "0.10.0.dev0",                        no,  yes,  yes, no,  no,  no),
        ("0.11 of 2024-06-04", "0.11.0.dev2024060400", no,  yes,  yes, yes, no,  yes),
        ("0.11", "0.11.0.dev2024060401",               yes, yes,  yes, yes, yes, yes),
        ("0.12", "0.12.0.dev0",                        yes, no,   no,  yes, yes, yes),
        ("0.13", "0.13.0.dev0",                        yes, no,   no,  yes, yes, yes),
        ("0.14", "0.14.0.dev0",                        yes, no,   no,  yes, yes, yes),
        ("0.15 to 0.17", "0.15.0.dev0",                yes, no,   no,  yes, yes, yes),
        ("0.18 to 0.21", "0.18.0.dev0",                yes, no,   no,  yes, yes, yes),
        ("1.0", "1.0.0.dev0",                          yes, no,   no,  yes, yes, yes),
        ("1.1", "1.1.0.dev0",                          yes, no,   no,  yes, yes, yes),
        ("1.2", "1.2.0.dev0",                          yes, no,   no,  yes, yes, yes),
        ("1.3 to rc20", "1.3.0.dev0",                  yes, no,   no,  yes, yes, yes),
    )  # fmt: skip
    return tuple(Release(row[0], Version(row[1]), *row[2:]) for row in rows)


RELEASES = _table()
"""Oldest first."""


def release_of(version: str) -> Release:
    """The line a version belongs to.

    Raises:
        UsageError: that is no version.
        EngineError: it has no builder for Phi checkpoints of this form.
    """
    try:
        asked = Version(version)
    except InvalidVersion:
        raise UsageError(
            f"'{version}' is not a version of TensorRT-LLM", hint=f"for example {NEWEST}."
        ) from None
    known = Version(asked.public)
    if known < RELEASES[0].since:
        raise EngineError(
            f"TensorRT-LLM {version} is too old: Phi checkpoints of this form are read since 0.10",
            hint=f"install a newer one: {INSTALL}",
        )
    if known > Version(LAST):
        raise EngineError(
            f"TensorRT-LLM {version} has no engine backend: trtllm-build was removed after {LAST}",
            hint=f"install a release that has it: {INSTALL}",
        )
    return [release for release in RELEASES if release.since <= known][-1]
