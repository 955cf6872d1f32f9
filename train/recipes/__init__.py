"""The recipes that ship with the package, one TOML file each, and the module that reads them.

The header of each file states its command, what it trains and its expected cost.

May import: the core.
"""
