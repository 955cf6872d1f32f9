"""``hipa-demo``: the whole chain on the embedded model, and each task on its shipped adaptor.

May import: everything but ``commands``. This is the one place of the core that runs every stage package.
"""
