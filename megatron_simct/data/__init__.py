"""Rows of a JSONL file -> prompts rendered for both models. The order depends on the seed alone."""
