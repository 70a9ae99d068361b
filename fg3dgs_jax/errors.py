"""How commands fail: one sentence that names the file or flag, what is wrong and the fix; exit code 2."""


class UserError(Exception):
    """Bad input. The message is one sentence a user can act on; commands print it and exit with 2."""
