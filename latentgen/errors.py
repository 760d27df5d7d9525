"""The one error that is meant for people: a line that says what is wrong and what would be right."""


class InputError(ValueError):
    """Something a person gave (a prompt, a folder, a recipe) cannot be used; the message is one clear line.

    The command line prints it alone and exits with code 2. said: another process prints it already.
    """

    said = False
