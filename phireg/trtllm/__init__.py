"""TensorRT-LLM: its releases, its builder's command line, built engines and their runtime.

Only ``runtime`` imports tensorrt_llm; the builder runs as a process of its own.
"""
