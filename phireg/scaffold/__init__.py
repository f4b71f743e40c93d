"""A new plugin package: what ``phireg new-plugin`` writes."""
