"""``hipa-demo``: the whole chain on the embedded model, and each task with its embedded adaptor.

May import: everything but ``commands``. This is the one room outside ``train`` and ``export`` that
calls both; it does so inside functions, so that the core can be imported without their libraries.
"""
