"""The files of the commands that make images: how they are written, and made once more.

May import everything of the core. The commands import it; it imports none of them.
"""
