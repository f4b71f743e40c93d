"""The quantization schemes phireg writes, by the names users type."""

from __future__ import annotations

WEIGHT_ONLY = {"int8": "W8A16", "int4": "W4A16"}
"""``--weight-only-precision`` to TensorRT-LLM's ``quant_algo``.

The portable on-disk form holds raw floating-point weights and only names the algorithm:
``trtllm-build`` quantizes them for the GPU it builds for. The pre-processed form depends on the
converting machine's GPU and carries no mark of it, so phireg never writes it.
"""
