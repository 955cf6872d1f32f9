"""Settings for every test."""

import os
import signal

# Before anything imports torch: one thread a worker. With several, on CPUs with AMX, the same
# convolution of one or two rows now and then rounds differently, and a resumed run must equal an
# unbroken one to the bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# Two workers with torch on two cores: how long one example takes says nothing.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A shell starts background commands with SIGINT ignored, and what the tests start would inherit
# that. Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
