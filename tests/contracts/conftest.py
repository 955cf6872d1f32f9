from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # surface, make_surfaces, typed_copy, strict_fake
