"""What a training would take, before it starts: memory, hours, and what ``--dry-run`` prints.

May import: the core and the other rooms of training.
"""
