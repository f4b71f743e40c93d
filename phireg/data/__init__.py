"""Between text and token ids: tokenizers, chat templates, stop ids, prompts, text as it comes."""
