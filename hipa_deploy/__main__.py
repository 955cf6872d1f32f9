"""``python -m hipa_deploy VERB``, and where ``hipa`` and every ``hipa-VERB`` start."""

from __future__ import annotations

import signal
import sys

from hipa_deploy.interrupts import signals_interrupt


def main() -> None:
    """Entry point of ``hipa``."""
    _run("main")


def verb_main() -> None:
    """Entry point of every ``hipa-VERB``."""
    _run("verb_main")


def _run(entry_point: str) -> None:
    """Import the commands and run them, so that Ctrl-C is one line during the import too."""
    with signals_interrupt() as interruption:
        problem: BaseException | None = None
        try:
            from hipa_deploy.commands import app
        except BaseException as error:
            problem = error
    if interruption.number is not None:
        sys.stderr.write("hipa: stopped\n")
        sys.exit(128 + interruption.number)
    if problem is not None:
        raise problem
    try:
        getattr(app, entry_point)()
    finally:
        # The work has ended. While Python shuts down, Ctrl-C would be a traceback.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
