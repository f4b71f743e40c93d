"""Engines of TensorRT and TensorRT for RTX, which phireg builds itself, without TensorRT-LLM."""
