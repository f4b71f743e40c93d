"""Configuration: a source config.json read as data, and its translation as a table of fields."""
