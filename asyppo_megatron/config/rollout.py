"""The section of generation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section


class SGLangConfig(Section):
    """SGLang servers: those of `urls`, those of `agents`, or those of one agent that the run starts itself."""

    urls: tuple[str, ...] = ()  # servers that others started and supervise
    agents: tuple[str, ...] = ()  # `asyppo serve` processes, by URL or by the file that holds it
    num_engines: int = Field(1, ge=1)  # an agent
    tp: int = Field(1, ge=1)
    gpus: tuple[int, ...] | None = None  # of an agent's node, `tp` an engine in turn; None: the first ones
    placement: Literal["separate", "colocated"] = "separate"  # colocated: GPUs that training uses in turn
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: what actor.precision says
    mem_fraction: float = Field(0.85, gt=0, lt=1)  # of a GPU's memory: weights and key-value cache
    context_length: int | None = Field(None, ge=2)  # None: longest prompt + longest response
    max_total_tokens: int | None = Field(None, ge=2)  # of the key-value cache; None: what memory allows
    attention_backend: str | None = None  # None: torch_native on a CPU, SGLang's choice on a GPU
    extra_args: tuple[str, ...] = ()  # of `python -m sglang.launch_server`
    max_concurrency: int = Field(256, ge=1)  # requests in flight, an engine
    request_timeout_s: float = Field(3600.0, gt=0)  # one generation
    max_attempts: int = Field(5, ge=1)  # at one response, before the run stops
    patience_s: float = Field(900.0, gt=0)  # without any usable engine, before the run stops
    kept_mass_every: int = Field(32, ge=0)  # responses between two whose kept mass is measured; 0: none
    start_timeout_s: float = Field(900.0, gt=0)
    health_interval_s: float = Field(10.0, gt=0)
    health_timeout_s: float = Field(120.0, gt=0)  # without an answer for so long an engine is hung
    max_restarts: int = Field(5, ge=0)  # of one engine within restart_window_s; then it is given up
    restart_window_s: float = Field(3600.0, gt=0)
    restart_backoff_s: float = Field(5.0, gt=0)  # before the first restart; doubled for each further one
    host: str = "127.0.0.1"  # where agent and engines listen
    port: int = Field(0, ge=0, le=65535)  # of the agent; 0: the kernel chooses
    linger_s: float = Field(600.0, ge=0)  # an agent that a run started outlives it by so long


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    sglang: SGLangConfig = SGLangConfig()
    prompts_per_step: int = Field(64, ge=1)
    responses_per_prompt: int = Field(32, ge=1)
    max_prompt_tokens: int = Field(1024, ge=1)
    max_response_tokens: int = Field(8192, ge=1)
    temperature: float = Field(0.99, gt=0)
    top_p: float = Field(0.99, gt=0, le=1)
    top_k: int = Field(100, ge=0)  # 0: off
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's and the model's end-of-sequence tokens
    max_batch: int = Field(256, ge=1)  # embedded engine: sequences generated at once
    timeout_s: float = Field(3600.0, gt=0)  # longest wait for one batch
    max_staleness: int = Field(
        0, ge=0
    )  # updates between the weights that sampled a token and the step that trains on it
    on_update: Literal["carry", "requeue"] = "carry"  # responses under way when new weights come
    partial: bool = False  # generation rests while the ranks train
    max_mismatch: float | None = Field(None, gt=0)  # mean |logprob difference| of a step, nats
