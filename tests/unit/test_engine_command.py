"""An engine's command line follows from the configuration; what contradicts it is refused before anything starts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from asyppo_megatron.config import Config, ConfigError, build_config
from asyppo_megatron.launch.engine_command import engine_command, missing_for_engines
from asyppo_megatron.launch.engine_process import version_error
from asyppo_megatron.rollout.agents import AgentAddress, AgentError, address_path, agent_urls


def config(run_dir: str = "runs/x", **sglang: Any) -> Config:
    rollout = {"engine": "sglang", "max_prompt_tokens": 100, "max_response_tokens": 900, "sglang": sglang}
    ppo = {"advantage": "grpo", "advantage_mask_fraction": 0, "entropy_mask_fraction": 0}
    actor, data = {"model": "models/actor"}, {"train": "train.jsonl", "tokenizer": "models/tokenizer"}
    return build_config({"run_dir": run_dir, "seed": 7, "actor": actor, "ppo": ppo, "data": data, "rollout": rollout})


def options(argv: tuple[str, ...]) -> dict[str, str]:
    """--name value pairs; a flag has itself as its value."""
    words = [*argv, "--"]
    pairs = itertools.pairwise(words)
    return {a[2:]: (a if b.startswith("--") else b) for a, b in pairs if a.startswith("--") and a != "--"}


def test_model_tokenizer_lengths_and_dtype_come_from_the_run():
    command = engine_command(config(tp=2), 1, 1234, 4, {})
    found = options(command.argv)
    assert found["model-path"] == str(Path("models/actor").resolve())
    assert found["tokenizer-path"] == str(Path("models/tokenizer").resolve())
    expected = {"context-length": "1000", "dtype": "bfloat16", "tp-size": "2", "port": "1234", "random-seed": "8"}
    assert {key: found[key] for key in expected} == expected
    assert found["host"] == "127.0.0.1"


def test_each_engine_sees_its_own_gpus_only():
    both = config(num_engines=2, tp=2)
    assert [engine_command(both, i, 1, 4, {}).environment["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    chosen = config(num_engines=2, tp=1, gpus=[3, 1])
    assert [engine_command(chosen, i, 1, 4, {}).gpus for i in (0, 1)] == [(3,), (1,)]
    restricted = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}  # the agent itself sees a part of the node
    assert engine_command(chosen, 0, 1, 4, restricted).environment["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(ValueError, match="this node has 2; lower num_engines"):
        engine_command(both, 0, 1, 2, {})


def test_colocated_engines_can_release_their_memory_and_do_not_spin():
    found = options(engine_command(config(placement="colocated"), 0, 1, 1, {}).argv)
    assert {"enable-memory-saver", "sleep-on-idle"} <= set(found)
    assert "enable-memory-saver" not in options(engine_command(config(), 0, 1, 1, {}).argv)


def test_on_a_cpu_the_backends_are_those_that_run_there():
    command = engine_command(config(), 0, 1, 0, {})
    expected = {"device": "cpu", "attention-backend": "torch_native", "max-total-tokens": "16000"}
    found = options(command.argv)
    assert {key: found[key] for key in expected} == expected
    assert command.environment["SGLANG_USE_CPU_ENGINE"] == "1"
    bound = engine_command(config(tp=2), 0, 1, 0, {}).environment["SGLANG_CPU_OMP_THREADS_BIND"]
    assert len(bound.split("|")) == 2
    assert "attention-backend" not in options(engine_command(config(), 0, 1, 1, {}).argv)  # SGLang chooses on a GPU


def test_an_engine_does_not_take_itself_for_a_rank():
    ranks = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "HOME": "/root"}
    environment = engine_command(config(), 0, 1, 0, ranks).environment
    assert environment["HOME"] == "/root"
    assert not set(ranks) - {"HOME"} & set(environment)


def test_extra_arguments_come_last():
    argv = engine_command(config(extra_args=["--chunked-prefill-size", "4096"]), 0, 1, 0, {}).argv
    assert argv[-2:] == ("--chunked-prefill-size", "4096")


@pytest.mark.parametrize(
    ("sglang", "message"),
    [
        ({"extra_args": ["--tp-size=4"]}, "got --tp-size, which rollout.sglang.tp decides"),
        ({"extra_args": ["--port", "1"]}, "got --port, which nothing: the agent chooses it"),
        ({"urls": ["http://a:1"], "agents": ["http://b:2"]}, "got urls and agents, need one of them"),
        ({"urls": ["a:1"]}, "got 'a:1', need http://host:port"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "need distinct ones"),
        ({"urls": ["http://a:99999"]}, "need http://host:port"),
        ({"agents": ["https://a:1"]}, "or a file that holds it"),
        ({"gpus": [0, 1, 2], "tp": 2}, "need 2 numbers >= 0"),
        ({"gpus": [1, 1], "tp": 2}, "need distinct GPUs"),
        ({"context_length": 999}, "need at least 1000"),
        ({"max_total_tokens": 999}, "need at least the 1000 tokens of one sequence"),
        ({"urls": ["http://a:1"], "placement": "colocated"}, "got colocated with urls"),
        ({"tpp": 2}, "did you mean 'tp'?"),
    ],
)
def test_contradictions_are_refused(sglang: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        config(**sglang)
    assert message in str(error.value)


def test_what_an_environment_lacks_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    present: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in present else None)
    assert 'pip install "asyppo_megatron[sglang]"' in missing_for_engines(8)
    present.add("sglang")
    assert missing_for_engines(8) == ""
    assert "CPU build of sgl_kernel" in missing_for_engines(0)
    present.add("sgl_kernel")
    assert missing_for_engines(0) == ""


def test_a_local_build_of_the_right_version_is_accepted():
    assert version_error("http://a:1", {"version": "0.5.23+cpu"}) == ""
    assert "got SGLang unknown, need 0.5.23" in version_error("http://a:1", {})


def test_agents_are_found_by_url_file_directory_and_in_the_runs_own_place(tmp_path: Path):
    here = AgentAddress("http://127.0.0.1:5", "a", 1, "x")
    run_dir = tmp_path / "run"
    here.write(address_path(run_dir, "a"))
    AgentAddress("http://127.0.0.1:6", "b", 1, "x").write(address_path(run_dir, "b"))
    urls = [f"http://127.0.0.1:{port}" for port in (5, 6)]
    assert agent_urls(config(str(run_dir))) == urls
    assert agent_urls(config(agents=[str(run_dir / "agents")])) == urls
    assert agent_urls(config(agents=[str(address_path(run_dir, "b")), "http://c:7/"])) == [urls[1], "http://c:7"]
    assert agent_urls(config(str(tmp_path / "other"))) == []
    with pytest.raises(AgentError, match="start `asyppo serve` first"):
        agent_urls(config(agents=[str(tmp_path / "nowhere.json")]))
    address_path(run_dir, "a").write_text("{")
    with pytest.raises(AgentError, match="not an agent's address"):
        agent_urls(config(str(run_dir)))
