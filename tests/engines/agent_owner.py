"""A run as far as its agent is concerned: take up or start one, say which, and hold it until stdin ends.

python agent_owner.py CONFIG; a line "finish" on stdin ends the run as a finished one, the end of stdin as a failed one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from asyppo_megatron.config import load_config
from asyppo_megatron.launch.run_agent import ensure_agent


def main() -> None:
    agent = ensure_agent(load_config(Path(sys.argv[1])), 0)
    print(json.dumps({"url": agent.client.url, **agent.client.health()}), flush=True)
    agent.close(finished=sys.stdin.readline() == "finish\n")


if __name__ == "__main__":
    main()
