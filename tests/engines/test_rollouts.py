"""Rollouts through a real SGLang server: what is recorded of each token, and what faults may not change."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_servers import END, EngineServer, run_config, start_engine
from faulty_proxy import CUT, HANG, PASS, REFUSE, FaultyProxy
from rollout_engines import make_engine, make_versions, reference_logits, reference_logprobs, requests

from asyppo_megatron.rollout.sglang import SGLangEngine
from asyppo_megatron.rollout.sglang_pool import EngineError


@pytest.fixture(scope="module")
def versions(engine_server: EngineServer, tmp_path_factory) -> Iterator[list[Path]]:
    """Weights of versions 0-2; the server has its own again afterwards."""
    yield make_versions(engine_server.model, tmp_path_factory.mktemp("versions"), 3)
    engine_server.post("/update_weights_from_disk", model_path=str(engine_server.model), weight_version="default")


class Engines:
    """Makes engines and proxies, and closes them."""

    def __init__(self, server: EngineServer, directory: Path):
        self._server, self._directory, self._made = server, directory, []

    def proxy(self, fault=lambda n: PASS) -> FaultyProxy:
        self._made.append(FaultyProxy(self._server.url, fault))
        return self._made[-1]

    def engine(self, *urls: str, sglang: dict | None = None, **rollout) -> SGLangEngine:
        config = run_config(
            self._server.model, self._directory / "run", list(urls or (self._server.url,)), sglang=sglang, **rollout
        )
        self._made.append(make_engine(config))
        return self._made[-1]

    def close(self) -> None:
        for made in reversed(self._made):
            made.close()


@pytest.fixture
def engines(engine_server: EngineServer, tmp_path) -> Iterator[Engines]:
    made = Engines(engine_server, tmp_path)
    yield made
    made.close()


def test_logprobs_are_of_the_temperature_scaled_softmax_before_the_filters(engines: Engines, versions):
    engine = engines.engine()
    engine.load_weights(versions[1], 1)
    asked = requests(6, 20, temperature=0.7, top_p=0.9, top_k=20)
    completions = sorted(engine.generate(asked), key=lambda c: c.index)
    assert [c.index for c in completions] == list(range(6))
    for request, found in zip(asked, completions, strict=True):
        assert found.finish_reason == ("stop" if found.tokens[-1] == END else "length")
        assert (found.policy_version, found.version_spans, found.attempts) == (1, (), 1)
        np.testing.assert_allclose(found.logprobs, reference_logprobs(versions[1], request, found), atol=1e-4)
        if request.index % 2:
            assert np.isnan(found.kept_mass), "asked of every second response"
            continue
        probabilities = (reference_logits(versions[1], request, found) / 0.7).softmax(-1)
        top = probabilities.sort(-1, descending=True).values[:, :20]
        kept = np.where((top.cumsum(-1) - top).numpy() < 0.9, top.numpy(), 0).sum(-1)
        assert found.kept_mass == pytest.approx(kept.mean(), abs=1e-4)


def test_greedy_responses_and_stop_tokens_are_those_of_the_model(engines: Engines, versions):
    engine = engines.engine()
    engine.load_weights(versions[0], 0)
    asked = requests(3, 8, temperature=0.0)
    for found in engine.generate(asked):
        logits = reference_logits(versions[0], asked[found.index], found)
        assert found.tokens.tolist() == logits.argmax(-1).tolist() and found.kept_mass == 1.0
    stop = int(found.tokens[2])
    (stopped,) = engine.generate(requests(1, 8, temperature=0.0, stop_token_ids=(stop,)))
    assert stopped.finish_reason == "stop" and int(stopped.tokens[-1]) == stop


@pytest.mark.parametrize("on_update", ["carry", "requeue"])
def test_weights_that_come_in_mid_response_leave_a_version_at_every_token(engines: Engines, versions, on_update):
    engine = engines.engine(on_update=on_update)
    engine.load_weights(versions[0], 0)
    asked = requests(12, 400, stop_token_ids=())
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(asked)))
    thread.start()
    time.sleep(0.5)
    engine.load_weights(versions[2], 2)
    thread.join(300)
    assert sorted(c.index for c in found) == list(range(12))
    crossed = [c for c in found if c.version_spans]
    assert crossed, "no response met the update"
    for completion in crossed[:2]:
        (zero, old), (switch, new) = completion.version_spans
        assert (zero, old, new, completion.policy_version) == (0, 0, 2, 0)
        before = reference_logprobs(versions[0], asked[completion.index], completion)
        after = reference_logprobs(versions[2], asked[completion.index], completion)
        np.testing.assert_allclose(completion.logprobs[:switch], before[:switch], atol=1e-4)
        is_clean = np.allclose(completion.logprobs[switch + 1 :], after[switch + 1 :], atol=1e-4)
        assert is_clean == (on_update == "requeue"), (
            "carried: on the old weights' keys and values; requeued: read again"
        )
    assert engine.statistics()["rollout/reissued"] == 0


def check_all_once(completions: list, proxy: FaultyProxy, count: int) -> None:
    assert sorted(c.index for c in completions) == list(range(count))
    # More where an engine was given up: what it still answered went to nobody.
    assert len(proxy.delivered) >= count, "a response without a reply"


@pytest.mark.parametrize("fault", [REFUSE, CUT])
def test_failed_requests_are_asked_for_again_and_no_response_comes_twice(engines: Engines, versions, fault):
    proxy = engines.proxy(lambda n: fault if n in (1, 2, 5) else PASS)
    engine = engines.engine(proxy.url)
    engine.load_weights(versions[0], 0)
    completions = list(engine.generate(requests(10, 8)))
    check_all_once(completions, proxy, 10)
    statistics = engine.statistics()
    assert statistics["rollout/reissued"] == sum(c.attempts - 1 for c in completions) >= 3
    assert engine.statistics()["rollout/reissued"] == 0


def test_an_engine_that_always_answers_500_stops_the_run_with_its_name_and_cause(engines: Engines, versions):
    proxy = engines.proxy(lambda n: REFUSE)
    engine = engines.engine(proxy.url, sglang={"max_attempts": 3})
    engine.load_weights(versions[0], 0)
    with pytest.raises(EngineError, match=rf"failed 3 times .*engine {proxy.url}: /generate: answered 500: .*injected"):
        list(engine.generate(requests(2, 4)))


def test_the_load_of_an_engine_that_fails_goes_to_the_others(engines: Engines, versions):
    good, bad = engines.proxy(), engines.proxy(lambda n: CUT if n else PASS)
    engine = engines.engine(good.url, bad.url, sglang={"max_attempts": 20})
    engine.load_weights(versions[0], 0)
    completions = list(engine.generate(requests(24, 4)))
    assert sorted(c.index for c in completions) == list(range(24))
    assert len(good.delivered) + len(bad.delivered) >= 24 and len(good.delivered) > 12


def test_idle_engines_share_the_requests(engines: Engines, versions):
    first, second = engines.proxy(), engines.proxy()
    engine = engines.engine(first.url, second.url, sglang={"max_concurrency": 2})
    engine.load_weights(versions[0], 0)
    assert len(list(engine.generate(requests(20, 6, stop_token_ids=())))) == 20
    assert min(len(first.delivered), len(second.delivered)) >= 5


def test_no_engine_at_all_is_an_error_with_the_cause(engines: Engines, versions):
    engine = engines.engine("http://127.0.0.1:9", sglang={"patience_s": 1.0})
    with pytest.raises(EngineError, match=r"none usable for 1 s .*http://127.0.0.1:9: .*connection lost"):
        engine.load_weights(versions[0], 0)


def test_a_stopped_engine_is_given_up_and_taken_up_again_with_its_weights(
    engines: Engines, engine_server: EngineServer, versions
):
    engine = engines.engine(sglang={"health_timeout_s": 3.0, "max_attempts": 20})
    engine.load_weights(versions[1], 1)
    asked = requests(12, 300, stop_token_ids=())
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(asked)))
    thread.start()
    time.sleep(0.4)
    pids = engine_server.process.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while engine.statistics()["rollout/engines"]:
            assert time.monotonic() < deadline, "the engine was not given up"
            time.sleep(0.2)
        assert len(found) < len(asked), "nothing was under way"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    thread.join(300)
    assert sorted(c.index for c in found) == list(range(12)) and {c.policy_version for c in found} == {1}
    completion = found[0]
    expected = reference_logprobs(versions[1], asked[completion.index], completion)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.slow
def test_a_killed_engine_leaves_its_requests_to_the_other_and_nothing_behind(
    engines: Engines, engine_server: EngineServer, versions, tmp_path
):
    second = start_engine(engine_server.model, tmp_path)
    try:
        engine = engines.engine(engine_server.url, second.url, sglang={"max_attempts": 20, "max_concurrency": 6})
        engine.load_weights(versions[1], 1)
        found: list = []
        thread = threading.Thread(target=lambda: found.extend(engine.generate(requests(12, 300, stop_token_ids=()))))
        thread.start()
        time.sleep(0.5)
        pids = second.process.pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        thread.join(300)
        assert sorted(c.index for c in found) == list(range(12))
        statistics = engine.statistics()
        assert (statistics["rollout/engines"], statistics["rollout/engines_lost"]) == (1, 1)
        assert 1 <= statistics["rollout/reissued"] <= 6
    finally:
        second.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(second.url.rpartition(":")[2]))), "its port is still open"


def test_an_engine_that_came_back_with_other_weights_generates_nothing_that_is_used(
    engines: Engines, engine_server: EngineServer, versions
):
    engine = engines.engine(sglang={"max_attempts": 20})
    engine.load_weights(versions[1], 1)
    engine_server.post("/update_weights_from_disk", model_path=str(versions[0]), weight_version="default")
    asked = requests(6, 10)
    found = list(engine.generate(asked))
    assert {c.policy_version for c in found} == {1} and min(c.attempts for c in found) > 1
    for completion in found[:2]:
        expected = reference_logprobs(versions[1], asked[completion.index], completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_a_request_that_hangs_ends_at_its_deadline_and_is_asked_for_again(engines: Engines, versions):
    proxy = engines.proxy(lambda n: HANG if n == 0 else PASS)
    engine = engines.engine(proxy.url, sglang={"request_timeout_s": 4.0, "max_attempts": 20})
    engine.load_weights(versions[0], 0)
    check_all_once(list(engine.generate(requests(4, 4))), proxy, 4)


def test_another_transports_weights_count_once_the_engine_has_them(
    engines: Engines, engine_server: EngineServer, versions
):
    engine = engines.engine()
    engine.load_weights(versions[0], 0)
    assert engine.begin_update() == [engine_server.url]
    engine.end_update(1)
    assert engine.needs_weights and engine.statistics()["rollout/engines"] == 0
    assert engine.begin_update() == [engine_server.url]
    engine_server.post("/update_weights_from_disk", model_path=str(versions[1]), weight_version="1")
    engine.end_update(1)
    assert engine.policy_version == 1 and not engine.needs_weights
    assert {c.policy_version for c in engine.generate(requests(3, 4))} == {1}


def test_a_token_that_would_end_the_server_is_refused_before_it_gets_there(engines: Engines, versions):
    engine = engines.engine()
    engine.load_weights(versions[0], 0)
    (request,) = requests(1, 4)
    request.prompt_tokens[0] = 512
    with pytest.raises(ValueError, match="token ids outside the model's 512"):
        list(engine.generate([request]))
