"""The one exception that a user can act on."""


class SubbyteError(ValueError):
    """Something the user can fix; the message names the value, the place and the remedy.

    The command line turns it into one line on stderr and exit code 2.
    """
