"""Which SGLang servers there are now: those that the configuration names, or those that node agents have ready."""

from __future__ import annotations

import logging
from typing import Any

from asyppo_megatron.config import Config
from asyppo_megatron.rollout.agents import AgentClient, AgentError, agent_urls

log = logging.getLogger(__name__)


class EngineFinder:
    """Asks the agents of a run. An agent that does not answer keeps the engines it had: they may well live.

    Attributes:
        missing: what keeps engines from being ready, as the agents say.
    """

    def __init__(self, config: Config):
        self._config = config
        self._known: dict[str, list[dict[str, Any]]] = {}
        self.missing: list[str] = []

    def find(self) -> list[tuple[str, str]]:
        """(url, incarnation) of every server that is up."""
        fixed = self._config.rollout.sglang.urls
        if fixed:
            return [(url.rstrip("/"), "") for url in fixed]
        self.missing = []
        try:
            agents = agent_urls(self._config)
        except AgentError as e:
            agents = list(self._known)
            self.missing.append(str(e))
        if not agents:
            self.missing.append(f"no agent has left its address for {self._config.run_dir}; start `asyppo serve`")
        for agent in agents:
            try:
                self._known[agent] = AgentClient(agent).engines()
            except AgentError as e:
                log.warning("%s", e)
                self.missing.append(str(e))
        rows = [row for agent in agents for row in self._known.get(agent, [])]
        self.missing += [f"{r['id']}: {r['state']}: {r['reason']}" for r in rows if r["state"] != "ready"]
        return [(r["url"].rstrip("/"), str(r["incarnation"])) for r in rows if r["state"] == "ready" and r["url"]]
