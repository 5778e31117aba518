"""The one exception type that kvenv raises for input it cannot use."""


class KvenvError(ValueError):
    """Something the user gave cannot be used; the message names it and the cure.

    The command line prints the message on one line and exits with status 2.
    """
