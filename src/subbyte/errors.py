"""The one exception that a user can act on."""


class SubbyteError(ValueError):
    """Something the user can fix; the message names the value, the place and the remedy.

    The command line turns it into one line on stderr and exit code 2.
    """


_HEAD, _TAIL = 600, 200  # characters of a message that quotes a file


def of_file(path: object, error: SubbyteError) -> SubbyteError:
    """The same error with the file's name before it.

    What a file says can be long, and messages quote it: the middle of a text of more than 800
    characters is left out.
    """
    text = str(error)
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return SubbyteError(f"{path}: {text}")
