"""An actor at TP2 x PP2 brings its weights to a real SGLang server: every transport, every parameter, every failure."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import actor_world
import pytest
import requests
import torch
from actor_world import ActorWorld
from engine_servers import EngineServer, start_engine, wait_until_ready
from faulty_proxy import FaultyProxy
from safetensors.torch import load_file, save_file

from asyppo_megatron.weight_sync.engines import EngineTarget

PROMPT = [10, 20, 30, 40, 50, 60]
TRANSPORTS = ["collective", "disk", "ipc"]
BUCKET = 200_000  # bytes: several buckets a stage


@pytest.fixture(scope="module")
def world(engine_model: Path) -> Iterator[ActorWorld]:
    world = ActorWorld(engine_model)
    yield world
    world.close()


@pytest.fixture(scope="module")
def versions(engine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Directories of the model with other weights, a number a directory; 0 is the model itself."""
    made = {0: engine_model}

    def version(number: int) -> Path:
        if number not in made:
            directory = tmp_path_factory.mktemp(f"weights-{number}")
            for file in engine_model.iterdir():
                if file.suffix == ".json":
                    (directory / file.name).write_bytes(file.read_bytes())
            generator = torch.Generator().manual_seed(number)
            tensors = load_tensors(engine_model)
            for name in sorted(tensors):
                tensors[name] = tensors[name] + 0.03 * torch.randn(tensors[name].shape, generator=generator)
            save_file(tensors, directory / "model.safetensors")
            made[number] = directory
        return made[number]

    return version


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def options(transport: str, directory: Path, **changes: Any) -> dict[str, Any]:
    given = {"transport": transport, "bucket_bytes": BUCKET, "checksum": "full", "timeout_s": 120.0}
    return given | {"directory": directory} | changes


def sync(
    world: ActorWorld, name: str, servers: Sequence[EngineServer | FaultyProxy], version: int, given: dict[str, Any]
) -> Any:
    """Push; what the ranks return, which is the same on all."""
    targets = [EngineTarget(s.url) for s in servers]
    first, *others = world.call(actor_world.push, name, targets, version, given)
    if isinstance(first, Exception):
        assert all(isinstance(o, Exception) for o in others)
    else:
        assert all(o == first for o in others), [first, *others]
    return first


def checksums(server: EngineServer) -> dict[str, str]:
    (rank,) = server.post("/weights_checker", action="checksum")["ranks"]
    return rank["checksums"]


def expected_checksums(directory: Path) -> dict[str, str]:
    """What an engine at tp 1 should report of a Hugging Face directory, worked out by hand."""
    tensors = load_tensors(directory)
    for name in [n for n in tensors if n.endswith("q_proj.weight")]:
        parts = [tensors.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    for name in [n for n in tensors if n.endswith("gate_proj.weight")]:
        parts = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return {n: hashlib.sha256(t.contiguous().numpy().tobytes()).digest()[:8].hex() for n, t in tensors.items()}


def assert_engine_is_the_actor(world: ActorWorld, server: EngineServer, version: int) -> None:
    """The engine's logprobs of what it generates are the actor's, and it names the version."""
    out = server.generate(PROMPT, max_new_tokens=24, temperature=1.0, ignore_eos=True)
    assert out["meta_info"]["weight_version"] == str(version)
    theirs = torch.tensor([item[0] for item in out["meta_info"]["output_token_logprobs"]])
    ours = [r for r in world.call(actor_world.logprobs, PROMPT + out["output_ids"]) if r is not None]
    for logprobs in ours:
        torch.testing.assert_close(logprobs[len(PROMPT) - 1 :], theirs, rtol=0, atol=1e-4)


def restore(world: ActorWorld, server: EngineServer, versions: Callable[[int], Path]) -> None:
    """The shared server as it was found."""
    server.post("/update_weights_from_disk", model_path=str(versions(0)), weight_version="default")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_three_updates_reach_the_engine_bit_for_bit(
    transport: str, world: ActorWorld, engine_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        world.call(actor_world.load, versions(number))
        done = sync(world, transport, [engine_server], number, options(transport, tmp_path))
        assert isinstance(done, dict), done
        assert done["compared"] == len(expected_checksums(versions(number))) and done["attempts"] == 1
        assert done["bytes"] == sum(t.numel() * t.itemsize for t in load_tensors(versions(number)).values())
    assert checksums(engine_server) == expected_checksums(versions(3))
    assert_engine_is_the_actor(world, engine_server, 3)
    restore(world, engine_server, versions)


def test_an_engine_that_has_the_version_is_left_alone(
    world: ActorWorld, engine_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    given = options("collective", tmp_path, checksum="sampled")
    world.call(actor_world.load, versions(1))
    first = sync(world, "again", [engine_server], 7, given)
    again = sync(world, "again", [engine_server], 7, given)
    assert first["engines"] == [engine_server.url] and again["engines"] == []
    assert 0 < first["compared"] < len(expected_checksums(versions(1)))
    restore(world, engine_server, versions)


def test_a_bucket_that_arrives_wrong_stops_the_run(
    world: ActorWorld, engine_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    given = options("collective", tmp_path)
    world.call(actor_world.load, versions(1))
    assert isinstance(sync(world, "wrong", [engine_server], 1, given), dict)
    world.call(actor_world.corrupt_next_bucket, "wrong")
    error = sync(world, "wrong", [engine_server], 2, given)
    assert isinstance(error, Exception)
    assert "does not hold what was sent" in str(error) and engine_server.url in str(error)
    # The engine stays paused until another push brings what it should hold.
    done = sync(world, "after", [engine_server], 3, given)
    assert isinstance(done, dict) and done["compared"]
    assert_engine_is_the_actor(world, engine_server, 3)
    restore(world, engine_server, versions)


def test_requests_under_way_go_on_with_the_new_weights_and_tell_whose_each_token_is(
    world: ActorWorld, engine_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    given = options("collective", tmp_path, pause_mode="in_place", timeout_s=240.0)
    world.call(actor_world.load, versions(2))
    sync(world, "carry", [engine_server], 1, given)
    world.call(actor_world.load, versions(3))
    sampling = {"max_new_tokens": 900, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "stream": True}
    with requests.post(f"{engine_server.url}/generate", json=body, stream=True, timeout=240) as answer:
        parts = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {"))
        next(parts)  # from now on it is under way
        done = sync(world, "carry", [engine_server], 2, given)
        assert isinstance(done, dict), done
        *_, last = parts
    assert last["meta_info"]["completion_tokens"] == 900
    spans = last["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["1", "2"], spans
    assert [(span["start"], span["end"]) for span in spans] == [(0, spans[1]["start"]), (spans[1]["start"], 900)]
    restore(world, engine_server, versions)


def test_a_colocated_engine_has_no_memory_between_release_and_its_new_weights(
    world: ActorWorld, engine_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    given = options("auto", tmp_path, colocated=True)
    world.call(actor_world.load, versions(1))
    assert isinstance(sync(world, "before", [engine_server], 1, given), dict)
    assert world.call(actor_world.wake, "before") == [None] * 4
    assert_engine_is_the_actor(world, engine_server, 1)
    assert world.call(actor_world.release, "before") == [None] * 4
    assert engine_server.get("/model_info")["weight_version"] == "released"
    assert world.call(actor_world.release, "before") == [None] * 4  # again, as a trainer would that lost count
    # Another trainer takes over, finds the engine without memory and brings it back.
    world.call(actor_world.load, versions(2))
    done = sync(world, "after-release", [engine_server], 2, given)
    assert isinstance(done, dict) and done["compared"], done
    assert world.call(actor_world.wake, "after-release") == [None] * 4
    assert_engine_is_the_actor(world, engine_server, 2)
    restore(world, engine_server, versions)


def test_a_full_disk_is_said_and_leaves_the_last_version(
    world: ActorWorld, engine_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    given = options("disk", tmp_path)
    world.call(actor_world.load, versions(1))
    assert isinstance(sync(world, "full", [engine_server], 1, given), dict)
    before = checksums(engine_server)
    world.call(actor_world.load, versions(2))
    world.call(actor_world.fill_disk, True)
    errors = world.call(actor_world.push, "full", [EngineTarget(engine_server.url)], 2, given)
    world.call(actor_world.fill_disk, False)
    what = f"weight sync of policy version 2: cannot write to {tmp_path}: "
    assert all(what in str(e) and "Free space" in str(e) for e in errors), errors
    assert any(f"{what}[Errno {errno.ENOSPC}] No space left on device" in str(e) for e in errors)
    assert [p.name for p in tmp_path.iterdir()] == ["v00000001"] and checksums(engine_server) == before
    engine_server.generate(PROMPT, max_new_tokens=2)
    restore(world, engine_server, versions)


@pytest.mark.parametrize(
    ("path", "status", "content", "message"),
    [
        ("/server_info", 200, {"version": "0.5.22"}, "got SGLang 0.5.22, need >= 0.5.23"),
        ("/begin_weight_update", 404, {"detail": "Not Found"}, "got a server without begin_weight_update, need SGLang"),
        ("/server_info", 200, {"version": "0.5.23", "pp_size": 2}, "got pp_size 2, need 1"),
    ],
)
def test_an_engine_without_the_protocol_or_of_another_kind_is_refused(
    world: ActorWorld, engine_server: EngineServer, tmp_path: Path, path: str, status: int, content: Any, message: str
) -> None:
    old = FaultyProxy(engine_server.url)
    old.answers[path] = (status, json.dumps(content).encode())
    try:
        error = sync(world, f"refused{path}{message[:6]}", [old], 1, options("collective", tmp_path))
    finally:
        old.close()
        engine_server.post("/continue_generation")
    assert isinstance(error, Exception) and f"engine {old.url}: {message}" in str(error)
    if "pp_size" not in message:
        assert "upgrade it, or set weight_sync.transport=disk" in str(error)


def test_no_engine_at_all_is_said(world: ActorWorld, tmp_path: Path) -> None:
    error = sync(world, "none", [], 1, options("collective", tmp_path, timeout_s=0.5))
    assert "no engine to send weights to: none is configured" in str(error)


@pytest.mark.slow
def test_a_killed_engine_rejoins_in_a_new_group(
    world: ActorWorld, engine_model: Path, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    given = options("collective", tmp_path)
    servers = [start_engine(engine_model, tmp_path / "log", index=i, wait=False) for i in range(2)]
    try:
        for server in servers:
            wait_until_ready(server)
        world.call(actor_world.load, versions(1))
        done = sync(world, "killed", servers, 1, given)
        assert isinstance(done, dict) and len(done["engines"]) == 2, done
        servers[1].close()
        world.call(actor_world.load, versions(2))
        done = sync(world, "killed", servers, 2, given)
        assert isinstance(done, dict) and done["engines"] == [servers[0].url], done
        assert_engine_is_the_actor(world, servers[0], 2)
        servers[1] = start_engine(engine_model, tmp_path / "log", index=1)
        done = sync(world, "killed", servers, 2, given)
        assert done["engines"] == [servers[1].url]  # the other has this version
        world.call(actor_world.load, versions(3))
        done = sync(world, "killed", servers, 3, given)
        assert len(done["engines"]) == 2
        for server in servers:
            assert checksums(server) == expected_checksums(versions(3))
            assert_engine_is_the_actor(world, server, 3)
        # Killed while the buckets go out: the survivor gets them in a group without it.
        world.call(actor_world.load, versions(1))
        world.call(actor_world.kill_before_bucket, "killed", servers[1].process.pids)
        done = sync(world, "killed", servers, 4, given)
        assert isinstance(done, dict) and done["engines"] == [servers[0].url] and done["attempts"] == 2, done
        assert checksums(servers[0]) == expected_checksums(versions(1))
    finally:
        for server in servers:
            server.close()


@pytest.mark.slow
def test_engines_beside_the_actor_and_others_in_one_push(
    world: ActorWorld, engine_server: EngineServer, engine_model: Path, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    other = start_engine(engine_model, tmp_path / "log")
    try:
        world.call(actor_world.load, versions(2))
        targets = [EngineTarget(engine_server.url, colocated=True), EngineTarget(other.url)]
        done = world.call(actor_world.push, "mixed", targets, 1, options("auto", tmp_path))[0]
        assert isinstance(done, dict), done
        for server in (engine_server, other):
            assert checksums(server) == expected_checksums(versions(2))
        joined = [" group_name=mixed-" in server.log.read_text() for server in (engine_server, other)]
        assert joined == [False, True], "only the engine that is not beside the actor is in a group with it"
    finally:
        other.close()
    restore(world, engine_server, versions)


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_at_tp_2_holds_the_actor(
    transport: str, world: ActorWorld, tp2_server: EngineServer, versions: Callable[[int], Path], tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        world.call(actor_world.load, versions(number))
        done = sync(world, f"{transport}-2", [tp2_server], number, options(transport, tmp_path))
        assert isinstance(done, dict), done
        assert done["compared"] == 2 * len(expected_checksums(versions(number)))
    assert_engine_is_the_actor(world, tp2_server, 3)


@pytest.fixture(scope="module")
def tp2_server(engine_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    server = start_engine(engine_model, tmp_path_factory.mktemp("engine-tp2"), tp=2)
    yield server
    server.close()
