"""Files and folders: written whole or not at all, read within limits, hashed, locked, kept inside.

May import the ground (errors, interrupts, record, tasks).
"""
