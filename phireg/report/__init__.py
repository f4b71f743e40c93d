"""Self-contained HTML pages about a verification, a quantization and a summarization."""
