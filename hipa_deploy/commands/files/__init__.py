"""What commands may write; the files of those that make images: how they are written, and again.

May import everything of the core. The commands import it; it imports none of them.
"""
