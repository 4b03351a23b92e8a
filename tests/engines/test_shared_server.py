"""The shared server answers as a run needs it, and ends without a trace."""

from __future__ import annotations

from engine_servers import END, EngineServer, logprob_error

from asyppo_megatron.launch.engine_process import server_info, version_error


def test_logprobs_of_generated_tokens_are_those_of_the_hugging_face_model(engine_server: EngineServer):
    assert logprob_error(engine_server, engine_server.model) < 1e-5


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
