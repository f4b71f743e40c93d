"""The source's own model, whole or one layer at a time."""
