"""The kernels' own tests run in processes of their own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os

# Set only by `test_interpreted.py`; a whole-suite run must neither interpret nor import these files.
if "ASYPPO_KERNEL_DEVICE" not in os.environ:
    collect_ignore = ["interpreted"]
