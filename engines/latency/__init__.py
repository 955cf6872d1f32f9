"""Latency, measured honestly: runs, conditions, layers, tables, plots, comparison, roofline.

May import: the core and the other rooms of ``engines``.
"""
