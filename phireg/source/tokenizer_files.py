"""Files that travel with the weights: data a tokenizer and generation need, and no code."""

CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "*.tiktoken",
)
"""File-name patterns in a source directory, copied beside the converted weights."""
