"""Options: what a run may say, how commands and files say it, and what a launcher tells a process."""
