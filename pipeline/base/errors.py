"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. The command prints the message without a traceback and exits with 1."""


def clip(text: str, length: int = 80) -> str:
    """The start of a text that a message quotes, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}…"


def printable(text: str) -> str:
    """The text with spaces for control characters, which have no place in a table, a page or an SVG."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
