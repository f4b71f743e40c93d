"""What TensorRT-LLM's checkpoint reader requires, stated once."""
