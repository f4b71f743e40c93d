"""A source model: a Hugging Face directory and the tensors in its files."""
