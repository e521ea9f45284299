"""What can go wrong with the local stack, as one line."""


class StackError(Exception):
    """The local stack could not be started, stopped or saved.

    The message is one line: the component, what happened, and where to look.
    """
