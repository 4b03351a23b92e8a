"""One SGLang server for all tests of a run, started when the first of them asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_runs import Runs
from engine_servers import EngineServer, make_tiny_model, start_engine

from asyppo_megatron.rollout.agents import AgentClient, AgentError, address_path, read_address


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs SGLang. The marker comes before the main conftest looks for it."""
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("sglang")


@pytest.fixture(scope="session")
def engine_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 with its tokenizer (fp32, vocabulary 512, ends at 258)."""
    return make_tiny_model(tmp_path_factory.mktemp("engine-model") / "qwen3")


@pytest.fixture(scope="session")
def engine_server(engine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """The shared server (tp 1). Leave it as you found it: weights of `engine_model`, not paused."""
    server = start_engine(engine_model, tmp_path_factory.mktemp("engine-server"))
    yield server
    server.close()


@pytest.fixture
def own_runs(engine_model: Path, tmp_path: Path) -> Iterator[Runs]:
    """Runs that start their engines themselves, in `tmp_path / "run"`; the agent there ends with the test."""
    runs = Runs(engine_model)
    yield runs
    runs.close()
    with contextlib.suppress(AgentError):
        AgentClient(read_address(address_path(tmp_path / "run")).url).shutdown()
