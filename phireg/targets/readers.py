"""Which release of which reader takes what of a target, for models of Phi's architectures.

What a release does was read in its source or seen in a run (November 2026). A reader that is not
named refuses the format, or was not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reader:
    """Releases that take a format; ``limit`` tells what they do not do with it."""

    name: str
    release: str
    limit: str = ""

    @property
    def text(self) -> str:
        """Name, release and limit in a few words."""
        return f"{self.name} {self.release}" + (f" ({self.limit})" if self.limit else "")


_VLLM, _SGLANG = Reader("vLLM", "0.33.0"), Reader("SGLang", "0.5.23")
_EDGE = Reader("TensorRT-Edge-LLM", "0.11.0")
_ENGINES = Reader("TensorRT-LLM engines", "0.12 to 1.2.1")
_TRANSFORMERS = Reader("transformers", "5.24")
_COMPRESSED = Reader("transformers", "5.24", "with compressed-tensors 0.20")
_IN_BFLOAT16 = Reader("transformers", "5.24", "with compressed-tensors 0.20; bfloat16 models")
_BACKEND = "TensorRT-LLM PyTorch backend"
_MODELOPT = Reader(_BACKEND, "of 2026")
_SINCE_JANUARY = Reader(_BACKEND, "of January 2026 on")

FP8_CACHE, UNQUANTIZED = "FP8 KV cache", "unquantized"
"""What stands beside the values of ``--qformat`` in the table."""

READERS: Mapping[str, Mapping[str, tuple[Reader, ...]]] = {
    "trtllm": {
        UNQUANTIZED: (_ENGINES,),
        **dict.fromkeys(("fp8", "int8_sq", "int8_wo", "int4_wo", "int4_awq"), (_ENGINES,)),
        "w4a8_awq": (Reader(_ENGINES.name, _ENGINES.release, "Ada, Hopper"),),
        "nvfp4": (Reader(_ENGINES.name, "0.17 to 1.2.1", "Blackwell"),),
        FP8_CACHE: (Reader(_ENGINES.name, _ENGINES.release, "0.12 takes 1 for the scale"),),
    },
    "hf": {UNQUANTIZED: (_TRANSFORMERS, _VLLM, _SGLANG, _MODELOPT, _EDGE)},
    "hf-modelopt": {
        "fp8": (_VLLM, _SGLANG, _EDGE, _MODELOPT),
        "fp8_pc_pt": (_VLLM,),
        "int8_sq": (_EDGE,),
        "int8_wo": (),
        "int4_awq": (_EDGE,),
        "w4a8_awq": (),
        "nvfp4": (_VLLM, _SGLANG, _EDGE, Reader(_BACKEND, "of 2026", "Blackwell")),
        FP8_CACHE: (_VLLM, _SGLANG, _EDGE, Reader(_BACKEND, "of 2026", "drops Phi-3's scales")),
    },
    "hf-compressed-tensors": {
        "fp8": (_COMPRESSED, _VLLM, _SGLANG, _SINCE_JANUARY),
        "fp8_dynamic": (_COMPRESSED, _VLLM, _SGLANG, _SINCE_JANUARY),
        "w8a8": (_COMPRESSED, _VLLM, _SGLANG),
        **dict.fromkeys(("w4a16", "int4_awq"), (_COMPRESSED, _VLLM, _SGLANG)),
        "nvfp4": (_IN_BFLOAT16, _VLLM),
        FP8_CACHE: (Reader("vLLM", "0.32.0"),),
    },
}
"""By target and format. TensorRT-LLM's PyTorch backend takes ModelOpt's AWQ for separate
projections alone: it cuts the packed rows of Phi-3's fused ones wrongly."""


def elsewhere(qformat: str, target: str) -> str:
    """Name the other targets whose readers take a format, and those readers; empty if none do."""
    found = [
        f"--target {name} ({', '.join(reader.text for reader in formats[qformat])})"
        for name, formats in READERS.items()
        if name != target and formats.get(qformat)
    ]
    return " or ".join(found)


def table() -> str:
    """Return the table of docs/targets.md."""
    rows = [
        f"| `{target}` | {qformat} | {', '.join(r.text for r in readers) or 'none known'} |"
        for target, formats in READERS.items()
        for qformat, readers in formats.items()
    ]
    return "\n".join(("| target | `--qformat` | readers |", "|---|---|---|", *rows))


def as_json(target: str, qformat: str) -> list[dict[str, Any]]:
    """Return the readers of a format as ``--json`` has them."""
    return [
        {"reader": reader.name, "release": reader.release, "limit": reader.limit or None}
        for reader in READERS.get(target, {}).get(qformat, ())
    ]
