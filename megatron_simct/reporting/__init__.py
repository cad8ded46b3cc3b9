"""Reporting: metrics and samples of a run, and where they are written."""
