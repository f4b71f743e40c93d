"""Files: regular files read with bounds, JSON, safetensors headers, atomic output directories."""
