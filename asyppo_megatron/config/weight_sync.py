"""The section of the weights' way into the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section


class WeightSyncConfig(Section):
    # auto: ipc for engines beside the actor, collective for the others; the embedded engine always takes disk
    transport: Literal["auto", "disk", "collective", "ipc"] = "auto"
    bucket_mb: int = Field(256, ge=1)
    dir: Path | None = None  # None: shared memory when it has room, else the run directory
    checksum: Literal["full", "sampled", "off"] = "sampled"
    timeout_s: float = Field(600.0, gt=0)  # longest wait for an engine's answer, and for one that restarts
