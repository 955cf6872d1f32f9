"""Settings for every test."""

from hypothesis import settings

# Two workers with torch on two cores: how long one example takes says nothing.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
