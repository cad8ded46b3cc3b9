"""The frozen model that scores the student's text. Read scorer.py (the Protocol), then colocated.py."""
