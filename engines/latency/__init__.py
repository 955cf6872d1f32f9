"""Latency: its measurement, conditions, layers, tables, plots, comparison and roofline.

May import: the core and the other rooms of ``engines``.
"""
