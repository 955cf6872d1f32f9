"""What this machine is: GPU, driver, memory, clocks, temperatures. Pure data; nothing here raises.

May import: the core.
"""
