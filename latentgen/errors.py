"""The one error that is meant for people, a line that says what is wrong and what would be right; and memory that ran
out, which many kinds of errors tell of.
"""


class InputError(ValueError):
    """Something a person gave (a prompt, a folder, a recipe) cannot be used; the message is one clear line.

    The command line prints it alone and exits with code 2. said: another process prints it already.
    """

    said = False


# torch's words, ONNX Runtime's, cuBLAS's
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Failed to allocate", "ALLOC_FAILED")


def is_no_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a GPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)
