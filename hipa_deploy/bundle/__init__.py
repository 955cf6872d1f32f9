"""The bundle on disk: manifest, files, reference, adaptors to swap in, and the parity gate.

May import: the ground (errors, files, hashing, record, tasks).
"""
