"""Model directories as data: what a source checkpoint holds, and safetensors headers."""
