"""What the commands say of themselves: help in groups, examples, the version, and ``hipa init``.

May import: the core.
"""
