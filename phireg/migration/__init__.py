"""From a TensorRT-LLM checkpoint to the Hugging Face directory that today's runtimes read."""
