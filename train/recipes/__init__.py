"""Recipes that ship with the package, one TOML file each; the header of a file states its command and its cost."""
