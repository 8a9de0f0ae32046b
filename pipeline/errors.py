"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. The command prints the message without a traceback and exits with 1."""
