"""Files: kinds of directories, bounded reading, JSON, safetensors headers, atomic output."""
