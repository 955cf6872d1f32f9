"""Settings for every test."""

import atexit
import os
import shutil
import signal
import tempfile

# Before anything imports torch: one thread per worker. With several threads, on CPUs with AMX, the
# same convolution of one or two rows sometimes rounds otherwise, and the tests of resumed runs
# compare bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test reads or changes the user's cache. Workers of pytest-xdist inherit the folder.
if "HIPA_CACHE" not in os.environ:
    os.environ["HIPA_CACHE"] = tempfile.mkdtemp(prefix="hipa-tests-")
    atexit.register(shutil.rmtree, os.environ["HIPA_CACHE"], ignore_errors=True)

from hypothesis import settings

# With two workers of torch on two cores, the time of one example says nothing.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A shell starts background commands with SIGINT ignored, and the processes that the tests start
# would inherit that. Some tests interrupt such a process as Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)
