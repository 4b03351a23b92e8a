"""Memory of every rank: what its roles keep, what a micro-batch needs at its peak, what an engine takes beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyppo_megatron.config import Config, RoleConfig
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.parallel.layout import ParallelLayout
from asyppo_megatron.plan.hardware import OVERHEAD_BYTES, USABLE_SHARE, Accelerator
from asyppo_megatron.plan.parameters import StateBytes, kind_of, model_elements, state_bytes


@dataclass(frozen=True)
class RoleMemory:
    """A role on its fullest rank of one stage.

    Attributes:
        state: weights, gradients, optimizer.
        activations: saved for the backward pass, and the largest layer at work.
        logits: logits, their probabilities and their gradient (values for a critic).
        step: what the optimizer's step needs for a moment, when activations are gone: torch's AdamW takes the roots
            of all second moments at once. Transformer Engine's needs nothing.
        offloaded: of the state, on the host while colocated engines generate.
    """

    role: str
    stage: int
    state: StateBytes
    activations: int
    logits: int
    step: int = 0
    offloaded: int = 0

    @property
    def transient(self) -> int:
        """What is there beside the state at the worst moment."""
        return max(self.activations + self.logits, self.step)

    @property
    def total(self) -> int:
        return self.state.total + self.transient


@dataclass(frozen=True)
class EngineMemory:
    """One engine's share of a GPU.

    Attributes:
        weights: bytes on each of its GPUs.
        cache: bytes left for keys and values on each of them.
        tokens: that the cache holds.
    """

    weights: int
    cache: int
    tokens: int
    on_training_gpus: bool


@dataclass
class RankMemory:
    """Everything on one rank. Roles take turns: their activations are not there at the same time."""

    rank: int
    roles: list[RoleMemory] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return sum(r.state.total for r in self.roles) + max((r.transient for r in self.roles), default=0)

    @property
    def beside_engine(self) -> int:
        """What stays while a colocated engine generates."""
        return sum(r.state.total - r.offloaded for r in self.roles)


def layer_activation_bytes(spec: ModelSpec, config: RoleConfig, tokens: int) -> int:
    """What one layer keeps for its backward pass, on one rank.

    Tensor parallelism cuts what lies inside attention and MLP; the residual stream and the norms are whole without
    sequence parallelism. Attention keeps its inputs and output (flash or SDPA), never the scores.
    """
    width = 2 if config.precision == "bf16" else 4
    tp, hidden = config.layout.tp, spec.hidden_size
    stream = hidden // (tp if config.layout.sp else 1)
    q, kv = spec.num_heads * spec.head_dim // tp, spec.num_kv_heads * spec.head_dim // tp
    ffn = spec.ffn_hidden_size // tp
    norms = 4 * stream  # inputs and outputs of both norms: the residual stream is one of the inputs
    if config.layout.sp:
        norms += 2 * hidden - 2 * stream  # the gathered inputs of qkv and fc1 live while their layer works
    attention = (q + 2 * kv) * 2 + q  # projected, normed and rotated; output
    if spec.qk_layernorm:
        attention += q + kv
    mlp = 2 * ffn + 2 * ffn  # gate and up; silu and product
    return tokens * width * (norms + attention + mlp)


def activation_bytes(spec: ModelSpec, config: RoleConfig, tokens: int) -> int:
    """The peak of a micro-batch's activations on a rank: those of the first stage, which keeps the most at a time."""
    width = 2 if config.precision == "bf16" else 4
    tokens //= config.layout.cp
    layers = spec.num_layers // config.layout.pp
    layer = layer_activation_bytes(spec, config, tokens)
    stream = spec.hidden_size // (config.layout.tp if config.layout.sp else 1)
    kept = tokens * width * stream * layers if config.recompute == "full" else layer * layers
    working = 2 * layer if config.recompute == "full" else layer  # recomputed, and its gradients
    return kept * config.layout.pp + working


def logits_bytes(spec: ModelSpec, config: RoleConfig, tokens: int, *, chunk: int | None) -> int:
    """Logits of a micro-batch in the role's precision, fp32 probabilities and fp32 gradient; of a chunk when fused."""
    width = 2 if config.precision == "bf16" else 4
    columns = spec.padded_vocab(config.layout.tp) // config.layout.tp
    rows = tokens // config.layout.cp if chunk is None else min(chunk, tokens)
    return rows * columns * (2 * width + 8)


def step_bytes(config: RoleConfig, state: StateBytes) -> int:
    """An fp32 number for every element whose optimizer state the rank keeps."""
    return state.optimizer // (12 if config.precision == "bf16" else 8) * 4


def role_memory(config: Config, name: str, role: RoleConfig, spec: ModelSpec, stage: int) -> RoleMemory:
    """A role's memory on the fullest rank of one of its stages."""
    kind = kind_of(name)
    state = max(state_bytes(spec, kind, role, stage), key=lambda s: s.total)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = max(role.max_tokens_per_micro_batch, longest)  # a longer sequence is a micro-batch of its own
    logits = 0
    if stage == role.layout.pp - 1:
        fused = config.actor.fused_head_chunk if config.actor.fused_head else None
        logits = logits_bytes(spec, role, tokens, chunk=fused) if kind == "actor" else 16 * tokens
    offloaded = {"none": 0, "optimizer": state.gradients + state.optimizer, "all": state.total}[role.offload]
    activations = activation_bytes(spec, role, tokens)
    return RoleMemory(name, stage, state, activations, logits, step_bytes(role, state), offloaded)


def rank_memory(config: Config, specs: dict[str, ModelSpec]) -> list[RankMemory]:
    """Every rank of the run with its roles."""
    ranks = [RankMemory(r) for r in range(config.num_ranks)]
    for name, role in config.roles().items():
        layout = ParallelLayout.of(role)
        stages = [role_memory(config, name, role, specs[name], s) for s in range(role.layout.pp)]
        frozen = [
            _reference_memory(specs["reference"], role, s)
            for s in range(role.layout.pp if name == "actor" and config.uses_reference else 0)
        ]
        for index, rank in enumerate(role.ranks):
            stage = index // (len(role.ranks) // layout.pp)  # the slowest axis
            ranks[rank].roles.append(stages[stage])
            if frozen:
                ranks[rank].roles.append(frozen[stage])
    return ranks


def _reference_memory(spec: ModelSpec, actor: RoleConfig, stage: int) -> RoleMemory:
    state = state_bytes(spec, "actor", actor, stage, trains=False)[0]
    return RoleMemory("reference", stage, state, 0, 0, offloaded=state.total if actor.offload == "all" else 0)


def engine_memory(config: Config, spec: ModelSpec, gpu: Accelerator) -> EngineMemory | None:
    """An engine on each of its GPUs; None for the embedded engine, which lives in the driver."""
    engines = config.rollout.sglang
    if config.rollout.engine != "sglang":
        return None
    width = 4 if (engines.dtype or ("float32" if config.actor.precision == "fp32" else "bfloat16")) == "float32" else 2
    total = model_elements(spec) * width
    weights = total // engines.tp
    cache = int(gpu.memory * engines.mem_fraction) - weights
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width // min(engines.tp, spec.num_kv_heads)
    return EngineMemory(weights, cache, max(cache, 0) // token, engines.placement == "colocated")


def misfits(config: Config, specs: dict[str, ModelSpec], gpu: Accelerator) -> list[str]:
    """Why a run does not fit, with what to change; empty when it fits."""
    found = []
    room = int(gpu.memory * USABLE_SHARE) - OVERHEAD_BYTES
    worst: dict[tuple[str, ...], RankMemory] = {}
    for rank in rank_memory(config, specs):
        key = tuple(r.role for r in rank.roles)
        if key not in worst or rank.peak > worst[key].peak:
            worst[key] = rank
    for roles, rank in worst.items():
        if rank.peak > room:
            found.append(
                f"rank {rank.rank} ({', '.join(roles)}): got {rank.peak / 1e9:.1f} GB, need at most "
                f"{room / 1e9:.1f} of {gpu.memory / 1e9:.0f}; {_advice(config, rank)}"
            )
    engine = engine_memory(config, specs["actor"], gpu)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if engine is not None and engine.tokens < longest:
        found.append(
            f"engine: got room for {engine.tokens} tokens of keys and values, need {longest} for one sequence; raise "
            "rollout.sglang.tp or mem_fraction"
        )
    if engine is not None and engine.on_training_gpus:
        state = max(rank.beside_engine for rank in worst.values() if rank.rank in config.actor.ranks)
        found += _engine_misfit(config, state, gpu.memory, room)
    return found


def _engine_misfit(config: Config, state: int, memory: float, room: int) -> list[str]:
    """Why an engine does not fit beside the weights and optimizer state that stay on its GPU."""
    share = config.rollout.sglang.mem_fraction
    if state + memory * share <= room:
        return []
    return [
        f"engine: got mem_fraction {share} beside {state / 1e9:.1f} GB of weights and optimizer state, need at most "
        f"{max(0.0, (room - state) / memory):.2f}; lower rollout.sglang.mem_fraction, raise layout.tp, or set offload"
    ]


def _advice(config: Config, rank: RankMemory) -> str:
    """What helps most against a rank's largest need."""
    largest = max(rank.roles, key=lambda r: r.total)
    role = config.roles()[largest.role if largest.role != "reference" else "actor"]
    where = largest.role.replace("critic_", "critics.") if largest.role != "reference" else "actor"
    if largest.logits > max(largest.activations, largest.state.total):
        return f"set {where}.fused_head=true, raise {where}.layout.tp or lower {where}.max_tokens_per_micro_batch"
    if largest.activations > largest.state.total:
        if role.recompute != "full":
            return f"set {where}.recompute=full or lower {where}.max_tokens_per_micro_batch"
        return f"lower {where}.max_tokens_per_micro_batch, or raise {where}.layout.tp or cp"
    if not role.optimizer.distributed:
        return f"set {where}.optimizer.distributed=true"
    return f"raise {where}.layout.tp or pp, or give {where} more ranks"
