"""The embedded engine against Hugging Face's own forward pass, and the sampling rule against hand-made numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyppo_megatron.rollout.embedded import EmbeddedEngine
from asyppo_megatron.rollout.engine import GenerationRequest, read_weights_manifest, write_weights_manifest
from asyppo_megatron.rollout.sampling import request_uniforms, sample

CPU = torch.device("cpu")


def save_model(directory: Path, seed: int = 0, tie: bool = False) -> Path:
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(model_dir).eval()


def build(model_dir: Path, max_batch: int = 16) -> EmbeddedEngine:
    engine = EmbeddedEngine(model_dir, torch.float32, CPU, max_batch)
    engine.load_pretrained(policy_version=7)
    return engine


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, int(rng.integers(1, 12))).astype(np.int32) for _ in range(count)]


def requests(count: int, **settings) -> list[GenerationRequest]:
    settings = {"max_new_tokens": 12, **settings}
    return [GenerationRequest(i, p, seed=100 + i, **settings) for i, p in enumerate(prompts(count))]


def reference_logits(model: Qwen3ForCausalLM, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """f32 [R, V]: the logits that each response token was sampled from."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_temperature_scaled_full_softmax(model_dir, reference, temperature):
    asked = requests(24, temperature=temperature, top_k=5, top_p=0.9, stop_token_ids=(3,))
    for done in build(model_dir).generate(asked):
        logits = reference_logits(reference, asked[done.index].prompt_tokens, done.tokens)
        chosen = torch.from_numpy(done.tokens).long()[:, None]
        expected = (logits / temperature).log_softmax(-1).gather(1, chosen)[:, 0]
        np.testing.assert_allclose(done.logprobs, expected.numpy(), atol=2e-5)
        assert done.policy_version == 7


def test_greedy_takes_the_most_probable_token_and_reports_temperature_one(model_dir, reference):
    asked = requests(8, temperature=0.0)
    for done in build(model_dir).generate(asked):
        logits = reference_logits(reference, asked[done.index].prompt_tokens, done.tokens)
        assert logits.argmax(-1).tolist() == done.tokens.tolist()
        np.testing.assert_allclose(done.logprobs, logits.log_softmax(-1).max(-1).values.numpy(), atol=2e-5)


def test_a_response_does_not_depend_on_the_batch_it_was_in(model_dir):
    engine = build(model_dir)
    asked = [*requests(30, stop_token_ids=(3, 4)), *requests(30, temperature=0.7, top_p=0.8)]
    asked = [GenerationRequest(**{**vars(r), "index": i}) for i, r in enumerate(asked)]
    together = {c.index: c for c in engine.generate(asked)}
    reversed_small = {c.index: c for c in build(model_dir, max_batch=7).generate(asked[::-1])}
    assert sorted(together) == list(range(60))
    for r in asked[::5]:
        (alone,) = engine.generate([r])
        for other in (together[r.index], reversed_small[r.index]):
            assert alone.tokens.tolist() == other.tokens.tolist()
            assert alone.finish_reason == other.finish_reason
            np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=2e-5)
            assert alone.kept_mass == pytest.approx(other.kept_mass, abs=1e-5)


def test_the_seed_alone_decides_and_a_longer_limit_only_appends(model_dir):
    engine = build(model_dir)
    prompt = prompts(1)[0]
    asked = [GenerationRequest(i, prompt, n, seed=s) for i, (n, s) in enumerate([(6, 1), (6, 1), (6, 2), (20, 1)])]
    got = {c.index: c.tokens.tolist() for c in engine.generate(asked)}
    assert got[0] == got[1] == got[3][:6]
    assert got[0] != got[2]


def test_a_response_ends_with_its_stop_token_or_at_its_own_limit(model_dir):
    stops = (3, 8, 11, 20)
    limits = [1, 2, 3, 9, 17]
    asked = [GenerationRequest(i, p, limits[i % 5], stop_token_ids=stops, seed=i) for i, p in enumerate(prompts(40))]
    seen = set()
    for done in build(model_dir).generate(asked):
        tokens = done.tokens.tolist()
        assert not set(tokens[:-1]) & set(stops)
        assert len(tokens) <= limits[done.index % 5] and len(done.logprobs) == len(tokens)
        assert done.finish_reason == ("stop" if tokens[-1] in stops else "length")
        if done.finish_reason == "length":
            assert len(tokens) == limits[done.index % 5]
        seen.add(done.finish_reason)
    assert seen == {"stop", "length"}


def test_kept_mass_is_the_mean_mass_of_the_filter(model_dir, reference):
    (off,) = build(model_dir).generate(requests(1))
    assert off.kept_mass == 1.0
    asked = requests(4, top_k=3)
    for done in build(model_dir).generate(asked):
        probs = reference_logits(reference, asked[done.index].prompt_tokens, done.tokens).softmax(-1)
        assert done.kept_mass == pytest.approx(probs.topk(3).values.sum(-1).mean().item(), abs=1e-5)


def draw(probs: list[float], uniforms: list[float], **settings) -> tuple[list[int], list[float] | None]:
    logits = torch.tensor([probs]).log().expand(len(uniforms), -1)
    tokens, logprobs, kept = sample(logits, torch.tensor(uniforms, dtype=torch.float64), 1.0, **settings)
    expected = torch.tensor(probs).log()[tokens]
    torch.testing.assert_close(logprobs, expected)
    return tokens.tolist(), None if kept is None else kept.tolist()


def test_sampling_inverts_the_cumulative_distribution():
    tokens, kept = draw([0.1, 0.5, 0.0, 0.4], [0.0, 0.09, 0.11, 0.59, 0.61, 0.999999])
    assert (tokens, kept) == ([0, 0, 1, 1, 3, 3], None)


def test_top_k_keeps_the_most_probable_and_reports_their_mass():
    tokens, kept = draw([0.1, 0.5, 0.05, 0.35], [0.0, 0.58, 0.59, 0.99], top_k=2)
    assert tokens == [1, 1, 3, 3]  # 0.5 / 0.85 = 0.588
    assert kept == pytest.approx([0.85] * 4)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    tokens, kept = draw([0.1, 0.5, 0.05, 0.35], [0.0, 0.99], top_p=0.8)
    assert tokens == [1, 3] and kept == pytest.approx([0.85] * 2)
    tokens, kept = draw([0.1, 0.5, 0.05, 0.35], [0.0, 0.99], top_p=0.01)
    assert tokens == [1, 1] and kept == pytest.approx([0.5] * 2)


def test_top_p_looks_at_the_full_distribution_also_under_top_k():
    # Renormalised over the top 3, the first two would hold 0.84 and suffice; of the full distribution they hold 0.8.
    tokens, kept = draw([0.5, 0.3, 0.15, 0.05], [0.99], top_k=3, top_p=0.82)
    assert tokens == [2] and kept == pytest.approx([0.95])


def test_sampled_frequencies_follow_the_filtered_distribution():
    uniforms = request_uniforms(5, 20000).tolist()
    tokens, _ = draw([0.5, 0.3, 0.15, 0.05], uniforms, top_k=3)
    counts = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(counts, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.012)


def test_random_numbers_depend_on_seed_and_position_alone():
    np.testing.assert_array_equal(request_uniforms(9, 5), request_uniforms(9, 50)[:5])
    assert request_uniforms(9, 1) != request_uniforms(10, 1)


def test_new_weights_change_the_responses_in_place(model_dir, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    engine = build(model_dir)
    write_weights_manifest(other, 8, ["model.safetensors"])
    engine.load_weights(other, 8)
    asked = requests(4)
    fresh = {c.index: c for c in build(other).generate(asked)}
    for done in engine.generate(asked):
        assert done.policy_version == 8
        assert done.tokens.tolist() == fresh[done.index].tokens.tolist()


def test_weights_may_come_in_several_files(model_dir, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:5]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "b.safetensors")
    write_weights_manifest(tmp_path, 1, ["a.safetensors", "b.safetensors"])
    engine = EmbeddedEngine(model_dir, torch.float32, CPU, 4)
    engine.load_weights(tmp_path, 1)
    asked = requests(2)
    expected = {c.index: c.tokens.tolist() for c in build(model_dir).generate(asked)}
    assert {c.index: c.tokens.tolist() for c in engine.generate(asked)} == expected


def test_a_tied_output_layer_may_be_absent(tmp_path):
    directory = save_model(tmp_path, tie=True)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert len(list(build(directory).generate(requests(2)))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "extra.weight: unknown to the model"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
            r"model.norm.weight: got shape \(5,\), need \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(model_dir, tmp_path, change, message):
    tensors = load_file(model_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    write_weights_manifest(tmp_path, 8, ["w.safetensors"])
    engine = build(model_dir)
    before = [c.tokens.tolist() for c in engine.generate(requests(1))]
    with pytest.raises(ValueError, match=message):
        engine.load_weights(tmp_path, 8)
    assert engine.policy_version == 7
    assert [c.tokens.tolist() for c in engine.generate(requests(1))] == before


def test_an_incomplete_weights_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got no weights.json"):
        read_weights_manifest(tmp_path, 1)
    write_weights_manifest(tmp_path, 1, ["a.safetensors"])
    with pytest.raises(ValueError, match=r"got no file \['a.safetensors'\]"):
        read_weights_manifest(tmp_path, 1)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ValueError, match="got policy_version 1, need 2"):
        read_weights_manifest(tmp_path, 2)
    (tmp_path / "weights.json").write_text(json.dumps(["x"]))
    with pytest.raises(ValueError, match="is not a manifest"):
        read_weights_manifest(tmp_path, 1)


def test_weights_that_are_not_finite_stop_generation(model_dir, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "w.safetensors")
    write_weights_manifest(tmp_path, 8, ["w.safetensors"])
    engine = build(model_dir)
    engine.load_weights(tmp_path, 8)
    with pytest.raises(RuntimeError, match="not finite under policy_version 8"):
        list(engine.generate(requests(2)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest(4, np.zeros(60, np.int32), 5), r"request 4: got 60 prompt \+ 5 response tokens, need <= 64"),
        (GenerationRequest(4, np.array([40], np.int32), 5), "request 4: got token ids outside the model's 40"),
        (GenerationRequest(4, np.zeros(0, np.int32), 5), "request 4: got an empty prompt"),
    ],
)
def test_requests_the_model_cannot_serve_are_refused(model_dir, request_, message):
    with pytest.raises(ValueError, match=message):
        list(build(model_dir).generate([request_]))


def test_an_engine_without_weights_says_so(model_dir):
    with pytest.raises(RuntimeError, match="call load_weights first"):
        list(EmbeddedEngine(model_dir, torch.float32, CPU, 4).generate(requests(1)))
