"""The command line, a module a command: each parses, calls and prints.

May import: everything, but only inside the functions that need it, so that ``--help`` answers at once.
"""
