"""TensorRT-LLM checkpoints on disk: rank files, the manifest, inspection."""
