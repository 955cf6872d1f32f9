"""The layout generic: stages with the inputs and outputs that optimum gives its own exports.

May import: the core.
"""
