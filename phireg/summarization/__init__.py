"""Summarization as upstream's task measures it: prompts, ROUGE, perplexity, and a page about it."""
