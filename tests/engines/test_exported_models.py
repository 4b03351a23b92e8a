"""SGLang loads what `asyppo convert` exports: every tensor, and nothing that it does not know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from engine_servers import EngineServer, logprob_error, make_tiny_model, original_of, start_engine

TOLERANCE = 1e-5  # nats, fp32


def assert_loaded_whole(server: EngineServer) -> None:
    """No tensor is unknown to the engine, and its logprobs are those of the original: none is missing or misplaced."""
    log = server.log.read_text()
    assert "Load weight end" in log  # else the next line would look for nothing
    complaint = re.compile("not found in params_dict|not initialized|(missing|unexpected) (key|weight|tensor)", re.I)
    assert [line for line in log.splitlines() if complaint.search(line)] == []
    assert logprob_error(server, original_of(server.model)) < TOLERANCE


def test_an_engine_loads_an_exported_qwen3_whole(engine_server: EngineServer):
    assert_loaded_whole(engine_server)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_an_engine_loads_every_exported_family_whole(tmp_path: Path, family: str, tied: bool):
    server = start_engine(make_tiny_model(tmp_path / "model", family, tied=tied), tmp_path)
    try:
        assert_loaded_whole(server)
    finally:
        server.close()
