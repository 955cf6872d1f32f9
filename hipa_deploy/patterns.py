"""Regular expressions of a stranger's, under one limit of time.

Some expressions take time exponential in the length of the text, and ``re`` cannot be stopped. The
package regex can; transformers depends on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hipa_deploy.errors import HipaError, brief, first_line

MAX_PATTERN = 1000  # characters


@dataclass
class Patterns:
    """Matches any number of expressions, all of them within some seconds of waiting together.

    Attributes:
        what: the setting that they come from, for messages.
        seconds: of the processor that matching may take in all.

    Example:
        >>> Patterns("rank_pattern").search("to_q$", "mid_block.to_q") is not None
        True

    """

    what: str
    seconds: float = 1.0
    _taken: float = field(default=0.0, init=False)

    def search(self, pattern: str, text: str) -> Any:
        """The first match anywhere in ``text``, as ``re.search`` gives it; None without one.

        Raises:
            HipaError: no regular expression, or the time is over.

        """
        import regex

        started = time.monotonic()
        problem = f"{self.what} has the pattern {brief(pattern)}"
        try:
            if len(pattern) > MAX_PATTERN:
                raise HipaError(f"{problem}. Expected at most {MAX_PATTERN} characters.")
            # A limit of 0 would be none.
            left = max(self.seconds - self._taken, 0.001)
            return regex.search(pattern, text, timeout=left)
        except TimeoutError:
            raise HipaError(
                f"{problem}, which takes longer than {self.seconds:g} s to match. "
                "Write it without repetitions within repetitions."
            ) from None
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise HipaError(
                f"{problem}, which is no regular expression ({first_line(error)}). Correct it."
            ) from None
        finally:
            self._taken += time.monotonic() - started
