"""What a user's mistake raises: one line that says what is wrong, where, and what to do. The CLI prints it and exits 2."""

_LONGEST = 1000


class PyfoldError(ValueError):
    """Bad input: a file, a tensor, an option.

    Messages quote what files say, so whatever would break the line, or the terminal, is escaped, and what is endless is cut.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        printable = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in message)
        super().__init__("".join(printable))
