"""What a user's mistake raises: one line that says what is wrong, where, and what to do. The CLI prints it and exits 2."""


class PyfoldError(ValueError):
    """Bad input: a file, a tensor, an option."""
