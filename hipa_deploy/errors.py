"""Errors for the user; every other exception is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral

from hipa_deploy.interrupts import raise_interruption


class HipaError(Exception):
    """A mistake that the user can fix.

    The message is one line and says what is wrong, what was got, what was expected and what to do.
    The commands print it without a traceback.
    """


class RequestError(HipaError):
    """A value of a request is at fault, and nothing else: with another one it would be answered.

    Its message is that of every ``HipaError``: it may name options and keywords. Whoever asks a
    service has neither, so that a service tells ``told`` in its place, and then ``owner`` as what
    only another person can do.

    Args:
        message: for the command line and the Python API.
        argument: the one of the Python API that is at fault, such as 'prompt'.
        code: for programs: one of the codes of docs/reference/http.md.
        told: what is wrong, what was expected and what to do, without options and keywords; None:
            the message is without them.
        owner: what the model's owner could do, as it follows 'The owner of the model can'.

    Example:
        >>> raise RequestError(
        ...     "height 64 is not a size of this bundle. Export with --dynamic for more.",
        ...     argument="height",
        ...     told="height 64 is not a size of this model. Expected 128.",
        ...     owner="export it for other sizes",
        ... )

    """

    # Every argument but the message has a default, as copies and pickles make it of the message.
    def __init__(
        self,
        message: str,
        *,
        argument: str | None = None,
        code: str = "invalid_value",
        told: str | None = None,
        owner: str | None = None,
    ) -> None:
        super().__init__(message)
        self.argument = argument
        self.code = code
        self.told = message if told is None else told
        self.owner = owner


class StoppedError(HipaError):
    """Ctrl-C or SIGTERM ended the work in order.

    Args:
        message: what was kept, and how to go on.
        number: the signal's number; a command ends with exit code 128 + ``number``.

    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class HipaWarning(UserWarning):
    """Something that a user wants to know and that stops nothing.

    The commands print it as one line on the standard error.
    """


class MissingDependencyError(HipaError):
    """A package of an extra is not installed; the message holds the pip command.

    Args:
        package: the package that is missing, such as 'torch'.
        extra: the extra of hipa-deploy that installs it, such as 'export'.

    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Run: pip install 'hipa-deploy[{extra}]'")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, at most 300 characters, for a message.

    An error without a message gives the name of its class.
    """
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of another library's error, for a message.

    PyTorch, for example, says in the last line which weights do not fit.
    """
    return str(error).strip().rpartition("\n")[2].strip()


@contextmanager
def as_line(
    problem: str, remedy: str, kind: Callable[[str], HipaError] = HipaError
) -> Iterator[None]:
    """Turn whatever a library raises in this block into a HipaError: problem, reason, remedy.

    Panics of libraries in Rust are no ``Exception``, an ``EOFError`` would look like Ctrl-D, and a
    library's ``SystemExit(0)`` like success: so everything is caught but a HipaError and Ctrl-C,
    which stays Ctrl-C even if the library made another error of it.

    Args:
        problem: what cannot be done.
        remedy: what to do.
        kind: makes the error of its message; want of memory is always a ``HipaError``.

    Raises:
        HipaError: in place of any other error.

    Example:
        >>> with as_line(f"{path} is not a tokenizer", "Export the bundle again."):
        ...     tokenizer = Tokenizer.from_file(str(path))

    """
    try:
        yield
    except (HipaError, KeyboardInterrupt, GeneratorExit):
        raise
    except MemoryError as error:
        raise_interruption()
        # numpy says how much it wanted; others say nothing.
        reason = first_line(error) if str(error) else "not enough memory"
        raise HipaError(f"{problem}: {reason}. {remedy}") from None
    except BaseException as error:
        raise_interruption()
        reason = first_line(error).rstrip(".")
        raise kind(f"{problem}: {reason}. {remedy}") from None


# What torch says where a GPU or a CPU has too little memory; its errors are RuntimeErrors.
_NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch found too little memory, of the machine or of a GPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


@contextmanager
def memory_remedy(remedy: str) -> Iterator[None]:
    """Turn an error for want of memory in this block into a HipaError with this remedy.

    Raises:
        HipaError: in place of such an error.

    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise HipaError(f"not enough memory ({first_line(error).rstrip('.')}). {remedy}") from None


def brief(value: object, most: int = 80) -> str:
    """A value of a stranger's file for a message: as Python writes it, cut to ``most`` characters.

    Example:
        >>> brief([1] * 1000, 10)
        '[1, 1, 1, …'

    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep list
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= most else f"{text[:most]}…"


def whole_number(value: object, name: str) -> int:
    """A number that a caller gave, one of numpy's too, as Python's.

    Args:
        value: what was given.
        name: of the argument, for the message.

    Raises:
        HipaError: it is no whole number.

    Example:
        >>> whole_number(np.uint8(200), "seed") + 100
        300

    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise HipaError(f"{name} is {brief(value)}. Expected a whole number.")
    return int(value)


def truth_value(value: object, name: str) -> bool:
    """True or False that a caller gave, one of numpy's too, as Python's.

    Args:
        value: what was given.
        name: of the argument, for the message.

    Raises:
        HipaError: it is something else: the text "no" would count as True.

    """
    # numpy's, which takes long to import, is called bool_, and bool since version 2.
    numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not isinstance(value, bool) and not numpys:
        raise HipaError(f"{name} is {brief(value)}. Expected True or False.")
    return bool(value)


def printable(text: str) -> str:
    """``text`` with an escape in place of each character that could move a terminal's cursor.

    Example:
        >>> printable("a" + chr(27) + "b")
        'a\\x1bb'

    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def reason_of(error: HipaError) -> str:
    """The words of an error, to stand in brackets in another one."""
    return str(error).strip().rstrip(".")
