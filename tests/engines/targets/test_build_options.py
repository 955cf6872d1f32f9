"""Options of a build: their ranges, and the command line that stands for them."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.errors import HipaError


def test_options_out_of_range_are_one_line():
    with pytest.raises(HipaError, match=r"optimization_level is 9. Expected 0 to 5"):
        BuildOptions(optimization_level=9)
    with pytest.raises(HipaError, match="workspace_mib is 0"):
        BuildOptions(workspace_mib=0)
