"""Images in and out: reading, masks, tiles, PNG with generation parameters, a task's source image.

May import the ground (errors, files, hashing, record, tasks) and ``bundle``.
"""
