"""What a user is told instead of a traceback."""


class UsageError(Exception):
    """The request is wrong: one sentence that says what to do. The commands exit with 2."""


class Fault(Exception):
    """What stops a job by no input's fault, and is understood: one sentence."""
