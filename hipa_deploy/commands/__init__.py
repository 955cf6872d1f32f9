"""The command line, one module a command: each parses its options, calls a function, prints.

May import: everything, but only inside the functions that need it, so that ``--help`` answers at
once. At the top of a module stand the standard library, Typer, rich and ``hipa_deploy.errors``.
"""
