"""Settings for every test."""

import signal

from hypothesis import settings

# Two workers with torch on two cores: how long one example takes says nothing.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A shell starts background commands with SIGINT ignored, and what the tests start would inherit that: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
