"""The interfaces, one method a file."""
