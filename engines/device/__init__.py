"""What this machine is and how it runs: memory, clocks, temperatures, power. Nothing here raises.

May import: the core.
"""
