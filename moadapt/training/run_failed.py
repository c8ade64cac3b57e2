"""The error of a run that cannot go on, through no fault of its settings."""


class RunFailed(Exception):
    """A run ended before its end: its message says why, what is kept, and what to do."""
