"""The shared server answers as a run needs it, and ends without a trace."""

from __future__ import annotations

import torch
from engine_servers import END, EngineServer
from transformers import AutoModelForCausalLM

from asyppo_megatron.launch.engine_process import server_info, version_error


def test_logprobs_of_generated_tokens_are_those_of_the_hugging_face_model(engine_server: EngineServer):
    prompt = [10, 20, 30, 40]
    answer = engine_server.generate(prompt, max_new_tokens=24, temperature=1.0, ignore_eos=True)
    tokens = answer["output_ids"]
    got = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    model = AutoModelForCausalLM.from_pretrained(engine_server.model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert len(tokens) == 24
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_generation_ends_at_the_models_end_of_sequence(engine_server: EngineServer):
    answer = engine_server.generate([1, 2, 3], max_new_tokens=4, temperature=1.0, logit_bias={str(END): 100.0})
    assert answer["output_ids"] == [END]
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_server_of_another_version_is_refused_with_what_to_do(engine_server: EngineServer):
    info = server_info(engine_server.url, 60)
    assert version_error(engine_server.url, info) == ""
    refusal = version_error(engine_server.url, info | {"version": "0.5.9"})
    for part in (engine_server.url, "0.5.9", "0.5.23", "begin_weight_update", "install sglang=="):
        assert part in refusal
