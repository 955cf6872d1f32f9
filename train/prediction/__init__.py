"""The prediction of a training before it starts: memory, hours, and the tables of ``--dry-run``.

May import: the core and the other rooms of training.
"""
