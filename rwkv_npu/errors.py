"""The errors that a user sees as a single line.

An error that the user can cause (a bad file, a flag out of range, a full disk) is one of these. Its message says what
was wrong, where, and what to do. Any other exception is a bug and keeps its traceback.
"""

LONGEST = 200  # characters of another library's message that we quote
_LONGEST_LINE = 1200  # characters of a whole message


def one_line(text: str) -> str:
    """`text` as one printable line: control characters as escapes, the middle of a very long one left out."""
    if not text.isprintable():
        escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        text = "".join(escaped)
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE // 2]} ... {text[-_LONGEST_LINE // 2 :]}"
    return text


class RwkvNpuError(Exception):
    """Base of every error that the command line shows as one line, with exit status 1.

    The message may quote file names and file contents. Characters that could harm a terminal are escaped here.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class CheckpointError(RwkvNpuError):
    """A checkpoint that cannot be read, is of an unsupported generation, or has wrong tensors."""


class BundleError(RwkvNpuError):
    """A bundle that is damaged, incomplete, of another version, or cannot be written."""


class StateError(RwkvNpuError):
    """A state file, or a state, that does not fit the model."""


class TokenizerError(RwkvNpuError):
    """A vocabulary file that cannot be read, or text asked of a model without a vocabulary."""


class BackendError(RwkvNpuError):
    """A backend that is unknown, not installed, or failed while it ran."""


class ToolkitError(RwkvNpuError):
    """Rockchip's compiler is missing, cannot be installed, or refused a graph."""


class UsageError(RwkvNpuError):
    """An argument that makes no sense. The message names it as in Python; the command line shows its flag."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most LONGEST characters; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LONGEST] if lines else type(error).__name__
