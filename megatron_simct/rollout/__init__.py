"""Responses to prompts: sampled by the student's training weights, given (sft), or replayed from a file.

Read engine.py (the Protocol), then megatron_engine.py and sampling.py.
"""
