"""Benchmarks with answers that a program can check: problems, responses, grades, intervals.

Read benchmarks.py (formats and prompts), grading.py (how responses are graded), sandbox.py,
program_server.py, plain.py and confined.py (how programs run), then statistics.py. tools/evaluate.py
generates the responses.
"""
