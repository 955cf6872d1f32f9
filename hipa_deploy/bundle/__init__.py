"""The bundle on disk: its manifest, its files, adaptors to swap in, and the parity gate.

May import: the ground (errors, files, hashing, record, tasks).
"""
