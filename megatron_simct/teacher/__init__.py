"""The frozen model that scores the student's text.

Read scorer.py (the Protocol) and forward.py (the model's part, whichever job it is in). colocated.py has it
on the student's ranks. For a job of its own: wire.py and payload.py (messages), endpoints.py (files, keys,
sockets), fingerprints.py, service.py (the teacher's end), client.py and remote.py (the student's end),
mixture.py (several jobs as one). build.py chooses.
"""
