"""One-step methods that others made: what their authors state, and what it means as numbers.

A preset is a TOML file here, with the source of each value beside it. May import the ground, the
manifest's records and ``models``; diffusers only inside the functions that make a scheduler.
"""
