"""The requirements of TensorRT-LLM's checkpoint reader, stated once."""
