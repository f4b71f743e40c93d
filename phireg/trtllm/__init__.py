"""TensorRT-LLM from outside: its releases, its builder's command line, and built engines.

Nothing here imports tensorrt_llm; the builder runs as a process of its own.
"""
