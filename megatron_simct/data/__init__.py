"""Rows of a JSONL file -> prompts rendered for both models, in an order that depends on the seed alone."""
