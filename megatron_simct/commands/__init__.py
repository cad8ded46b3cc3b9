"""Commands beside the two jobs and the launcher: tools/NAME.py and its console script both call `main` of
NAME here.

They know every other part, and none knows them.
"""
