"""Reward models over HTTP: scores of a real server against the model itself, refusals, and a server that stays away."""

from __future__ import annotations

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, Qwen3Config, Qwen3ForTokenClassification

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards import ModelReward, Sample, Verdict
from asyppo_megatron.rewards.serve_model import RewardModel, build_server

VOCABULARY = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A mini-critic as the product exports it: a decoder with score.weight and score.bias."""
    path = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        head_dim=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        num_labels=1,
    )
    Qwen3ForTokenClassification(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(directory):
    server = build_server(RewardModel(directory, torch.device("cpu"), torch.float32), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def build(url: str, per: str = "response", **more) -> ModelReward:
    model = {"url": url, "api": "pooling", "patience_s": 30.0} | more
    return ModelReward(RewardConfig.model_validate({"kind": "model", "per": per, "timeout_s": 20, "model": model}))


def samples(count: int = 20, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt, response = (tuple(rng.integers(0, VOCABULARY, rng.integers(1, 30)).tolist()) for _ in range(2))
        ends = tuple(sorted(rng.choice(len(response), min(3, len(response)), replace=False).tolist()))
        pieces = ("step",) * len(ends)
        found.append(Sample("", "", pieces=pieces, ends=ends, prompt_tokens=prompt, response_tokens=response))
    return found


@torch.no_grad()
def expected(directory, sample: Sample) -> np.ndarray:
    """f64 scores of the response's tokens by the model itself, unbatched."""
    model = AutoModelForTokenClassification.from_pretrained(directory, dtype=torch.float64)
    ids = torch.tensor([[*sample.prompt_tokens, *sample.response_tokens]])
    return model(input_ids=ids).logits[0, len(sample.prompt_tokens) :, 0].numpy()


def test_scores_are_those_of_the_model_itself(directory, url):
    given = samples()
    whole = build(url, batch=7).score_many(given)
    steps = build(url, "step", batch=3).score_many(given)
    tokens = build(url, "token").score_many(
        [s._replace(ends=tuple(range(len(s.response_tokens))), pieces=("t",) * len(s.response_tokens)) for s in given]
    )
    for sample, w, s, t in zip(given, whole, steps, tokens, strict=True):
        scores = expected(directory, sample)
        assert w.reward == pytest.approx(scores[-1], abs=1e-5)
        np.testing.assert_allclose(s.pieces, scores[list(sample.ends)], atol=1e-5)
        np.testing.assert_allclose(t.pieces, scores, atol=1e-5)
        assert s.reward == pytest.approx(sum(s.pieces)) and (w.status, s.status, t.status) == ("ok",) * 3


def test_scores_may_pass_through_a_sigmoid(url):
    given = samples(3)
    plain, squashed = build(url).score_many(given), build(url, transform="sigmoid").score_many(given)
    for p, s in zip(plain, squashed, strict=True):
        assert s.reward == pytest.approx(1 / (1 + math.exp(-p.reward)))


def test_a_response_without_pieces_costs_no_request():
    sample = Sample("", "", prompt_tokens=(1,), response_tokens=(2,))
    assert build("http://127.0.0.1:9", "step").score_many([sample]) == [Verdict(0.0)]


def test_one_sequence_that_the_server_refuses_spoils_no_other(url):
    good = samples(3)
    bad = good[1]._replace(response_tokens=(VOCABULARY + 1,))
    found = build(url, batch=8).score_many([good[0], bad, good[2]])
    assert [v.status for v in found] == ["ok", "model_refused", "ok"]
    assert found[0] == build(url).score_many([good[0]])[0]


class Script:
    """A real server that answers requests as a script says, (code, body) or seconds to hang."""

    def __init__(self, *answers):
        script = iter(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                answer = next(script)
                if isinstance(answer, float):
                    time.sleep(answer)
                    return
                body = json.dumps(answer[1]).encode() if not isinstance(answer[1], bytes) else answer[1]
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


GOOD = (200, {"data": [{"index": 0, "data": [[0.0], [2.5]]}]})
ONE = Sample("", "", prompt_tokens=(1,), response_tokens=(2,))


def test_a_server_that_stumbles_is_asked_again():
    with Script((503, {}), (200, b"{cut off"), (429, {}), GOOD) as server:
        assert build(server.url).score_many([ONE]) == [Verdict(2.5)]


def test_a_server_that_hangs_is_asked_again():
    with Script(2.0, GOOD) as server:
        reward = ModelReward(
            RewardConfig.model_validate(
                {"kind": "model", "timeout_s": 0.5, "model": {"url": server.url, "api": "pooling"}}
            )
        )
        assert reward.score_many([ONE]) == [Verdict(2.5)]


def test_a_server_that_stays_away_ends_the_run_instead_of_scoring_zero():
    with pytest.raises(RuntimeError, match=r"reward model http://127.0.0.1:9/pooling: no answer for 1 s .*refused"):
        build("http://127.0.0.1:9", patience_s=1.0).score_many([ONE])


@pytest.mark.parametrize(
    "answer",
    [{}, [], {"data": []}, {"data": [{"index": 0, "data": [[1.0]]}]}, {"data": [{"index": 0, "data": 1.0}]}],
)
def test_an_answer_of_another_shape_ends_the_run(answer):
    with Script((200, answer)) as server, pytest.raises(RuntimeError, match="got scores of sizes .*, need"):
        build(server.url).score_many([ONE])


def test_a_score_that_is_no_number_is_counted():
    with Script((200, b'{"data": [{"index": 0, "data": [[0.0], [NaN]]}]}')) as server:
        assert build(server.url).score_many([ONE]) == [Verdict(0.0, "model_value")]


@pytest.mark.parametrize("body", [b"{", b'{"input": 3}', b'{"input": [[1], "x"]}', b'{"input": [[]]}', b"[]"])
def test_the_small_server_refuses_what_it_cannot_read(url, body):
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url + "/pooling", body), timeout=20)
    assert error.value.code == 400
    assert urllib.request.urlopen(url + "/health", timeout=20).status == 200
