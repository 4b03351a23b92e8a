"""The configuration of a run: frozen pydantic models, every cross-check, one list of all errors.

`load_config` reads YAML, applies `key=value` overrides and either returns a `Config` or raises `ConfigError`
with everything that is wrong. Checks that need a model or a dataset on disk live in `preflight.py`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

PAPER_SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # appendix A.2


class ConfigError(ValueError):
    """Everything wrong with a configuration, at once.

    Attributes:
        errors: one line each: what was found, what is needed, what to do.
    """

    def __init__(self, errors: list[str]):
        self.errors = errors
        super().__init__("\n".join(f"  - {e}" for e in errors))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LayoutConfig(_Section):
    """Parallel layout of one role; data parallelism is what remains of its ranks."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    sequence_parallel: bool | None = None  # None: on when tp > 1

    @property
    def sp(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel


class OptimizerConfig(_Section):
    """AdamW with warm-up and decay; steps are optimizer steps of the role."""

    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)  # 0: off
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: int | None = Field(None, ge=1)  # None: the run's length
    distributed: bool = True  # shard optimizer state over data parallel


class RoleConfig(_Section):
    """One model of the run: where it starts from, where it runs, how it trains."""

    model: Path
    ranks: tuple[int, ...] = (0,)
    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    mini_batch_size: int | None = Field(None, ge=1)  # responses an optimizer step; None: the whole batch
    epochs: int = Field(1, ge=1)

    @field_validator("ranks", mode="before")
    @classmethod
    def _parse_ranks(cls, value: Any) -> Any:
        """Accepts `3`, `"0-1"`, `"0,2-3"` or a list of numbers."""
        if isinstance(value, int):
            return (value,)
        if not isinstance(value, str):
            return value
        ranks: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            if not first.isdigit() or (last and not last.isdigit()):
                raise ValueError(f"got {value!r}, need ranks like '0-7' or '0,2-3'")
            ranks.extend(range(int(first), int(last or first) + 1))
        return tuple(ranks)

    @property
    def dp(self) -> int:
        return len(self.ranks) // (self.layout.tp * self.layout.pp * self.layout.cp)


class CriticConfig(RoleConfig):
    head_init: Literal["random", "zero"] = "random"  # used when the checkpoint has no value head
    value_clip: float | None = Field(None, gt=0)


class ReferenceConfig(_Section):
    """Frozen copy of the actor's starting point; runs on the actor's ranks with the actor's layout."""

    model: Path | None = None  # None: actor.model


class KLConfig(_Section):
    coef: float = Field(0.0, ge=0)
    kind: Literal["k1", "k2", "k3"] = "k3"
    where: Literal["loss", "reward"] = "loss"


class PPOConfig(_Section):
    """The algorithm (defaults: AsyPPO as in the paper, sections 4 and A.3)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(1.0, ge=0, le=1)
    value_aggregate: Literal["mean", "min"] = "mean"
    advantage_mask_fraction: float = Field(0.2, ge=0, le=1)  # k
    entropy_mask_fraction: float = Field(0.2, ge=0, le=1)  # h
    entropy_coef: float = Field(0.01, ge=0)  # beta
    loss: Literal["ppo", "gspo", "cispo", "aspo", "asympo", "spo"] = "ppo"
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    whiten_advantages: bool = False
    order: Literal["critics_first", "values_first"] = "critics_first"
    share_remainder: Literal["error", "rotate", "drop"] = "error"
    kl: KLConfig = KLConfig()
    importance: Literal["none", "truncated", "masked"] = "none"
    importance_cap: float = Field(2.0, gt=0)


class RolloutConfig(_Section):
    engine: Literal["embedded"] = "embedded"
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


class RewardConfig(_Section):
    kind: Literal["math", "exact"] = "math"
    workers: int = Field(4, ge=1)
    timeout_s: float = Field(6.0, gt=0)  # hard limit a call; the process is killed after it
    memory_gb: float = Field(2.0, gt=0)
    answer_pattern: str = r"#([^#$]*)\$?$"  # exact: the last match's group 1 is compared


class EvalSetConfig(_Section):
    name: str
    path: Path
    limit: int | None = Field(None, ge=1)


class DataConfig(_Section):
    train: Path
    eval: tuple[EvalSetConfig, ...] = ()
    tokenizer: Path | None = None  # None: actor.model
    chat_template: Literal["system", "none"] = "system"  # none: the problem text as it is
    system_prompt: str = PAPER_SYSTEM_PROMPT
    shuffle: bool = True


class EvalConfig(_Section):
    every: int = Field(0, ge=0)  # steps; 0: never during training
    at_start: bool = True
    greedy: bool = True
    samples: int = Field(0, ge=0)  # k of avg@k; 0: greedy only
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_response_tokens: int | None = Field(None, ge=1)  # None: rollout.max_response_tokens


class CheckpointConfig(_Section):
    every: int = Field(50, ge=0)  # steps; 0: only at the end
    keep: int = Field(2, ge=1)
    async_save: bool = True
    at_end: bool = True
    export_hf: bool = True  # Hugging Face model of the actor and the critics at the end


class LoggingConfig(_Section):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "asyppo"
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"


class WeightSyncConfig(_Section):
    bucket_mb: int = Field(256, ge=1)
    dir: Path | None = None  # None: shared memory when it has room, else the run directory


class Config(_Section):
    run_dir: Path = Path("runs/asyppo")
    seed: int = 0
    num_steps: int = Field(500, ge=0)
    actor: RoleConfig
    critics: tuple[CriticConfig, ...] = ()
    reference: ReferenceConfig = ReferenceConfig()
    ppo: PPOConfig = PPOConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    logging: LoggingConfig = LoggingConfig()
    collective_timeout_s: float = Field(1800.0, gt=0)

    @property
    def num_critics(self) -> int:
        return len(self.critics)

    @property
    def num_ranks(self) -> int:
        return max(r for role in self.roles().values() for r in role.ranks) + 1

    @property
    def uses_reference(self) -> bool:
        return self.ppo.kl.coef > 0

    @property
    def batch_size(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt

    def roles(self) -> dict[str, RoleConfig]:
        """Trained roles by name, in the fixed order in which every rank builds them."""
        return {"actor": self.actor, **{f"critic_{m}": c for m, c in enumerate(self.critics)}}


def cross_checks(config: Config) -> list[str]:
    """Everything that is wrong between sections; empty when nothing is."""
    errors: list[str] = []
    for name, role in config.roles().items():
        errors.extend(_role_errors(name, role, config.batch_size))
    errors.extend(_placement_errors(config))
    errors.extend(_algorithm_errors(config))
    if config.rollout.top_p < 1 and config.rollout.top_k == 1:
        errors.append("rollout: got top_k 1 with top_p < 1, need one of them; set top_p 1.0 for greedy rollouts")
    names = [e.name for e in config.data.eval]
    if len(set(names)) != len(names):
        errors.append(f"data.eval: got names {names}, need distinct ones; rename one")
    if config.eval.every and not config.data.eval:
        errors.append("eval.every: got a period but no data.eval set; add one or set eval.every=0")
    return errors


def _role_errors(name: str, role: RoleConfig, batch_size: int) -> list[str]:
    errors = []
    layout, ranks = role.layout, role.ranks
    where = name.replace("critic_", "critics.")
    size = layout.tp * layout.pp * layout.cp
    if layout.cp > 1:
        errors.append(f"{where}.layout.cp: got {layout.cp}, need 1; context parallelism is not supported yet")
    if not ranks or len(set(ranks)) != len(ranks) or min(ranks, default=0) < 0:
        errors.append(f"{where}.ranks: got {list(ranks)}, need distinct ranks >= 0")
    elif len(ranks) % size:
        errors.append(
            f"{where}.layout: got tp {layout.tp} x pp {layout.pp} x cp {layout.cp} = {size} on {len(ranks)} ranks, "
            f"need a divisor of {len(ranks)}; change the layout or {where}.ranks"
        )
    if layout.sequence_parallel and layout.tp == 1:
        errors.append(f"{where}.layout.sequence_parallel: got true with tp 1, need tp > 1; leave it out")
    if role.mini_batch_size is not None and (role.mini_batch_size > batch_size or batch_size % role.mini_batch_size):
        errors.append(
            f"{where}.mini_batch_size: got {role.mini_batch_size}, need a divisor of the {batch_size} responses of a "
            "step (rollout.prompts_per_step x responses_per_prompt)"
        )
    if role.optimizer.min_lr > role.optimizer.lr:
        errors.append(f"{where}.optimizer.min_lr: got {role.optimizer.min_lr} > lr {role.optimizer.lr}; lower it")
    return errors


def _placement_errors(config: Config) -> list[str]:
    errors = []
    spans = {name: set(role.ranks) for name, role in config.roles().items()}
    names = list(spans)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if spans[a] & spans[b] and spans[a] != spans[b] and not (spans[a] <= spans[b] or spans[b] <= spans[a]):
                errors.append(
                    f"ranks: got {a} on {sorted(spans[a])} and {b} on {sorted(spans[b])}, which overlap in part; "
                    "give them the same ranks, one inside the other, or disjoint ones"
                )
    used = set().union(*spans.values())
    if used and used != set(range(max(used) + 1)):
        missing = sorted(set(range(max(used) + 1)) - used)
        errors.append(f"ranks: got no role on {missing}, need every rank from 0 to {max(used)} used; close the gap")
    return errors


def _algorithm_errors(config: Config) -> list[str]:
    ppo, critics, group = config.ppo, config.num_critics, config.rollout.responses_per_prompt
    errors = []
    k, h = ppo.advantage_mask_fraction, ppo.entropy_mask_fraction
    if k + h > 1:
        errors.append(f"ppo: got advantage_mask_fraction {k} + entropy_mask_fraction {h} > 1; lower one")
    if (k > 0 or h > 0) and critics < 2:
        errors.append(
            f"ppo: got masks (advantage {k}, entropy {h}) with {critics} critic(s), need >= 2 to disagree; "
            "add a critic or set both fractions to 0"
        )
    if ppo.advantage == "gae" and critics == 0:
        errors.append("critics: got none with ppo.advantage gae, need >= 1; add a critic or choose grpo/dr_grpo/rloo")
    if ppo.advantage != "gae" and critics:
        errors.append(
            f"critics: got {critics} with ppo.advantage {ppo.advantage}, which uses none; remove them or choose gae"
        )
    if ppo.advantage != "gae" and group == 1:
        errors.append(f"rollout.responses_per_prompt: got 1 with ppo.advantage {ppo.advantage}, need >= 2")
    if critics > 1 and group % critics and ppo.share_remainder == "error":
        errors.append(
            f"rollout.responses_per_prompt: got {group}, not divisible by {critics} critics; choose a multiple of "
            f"{critics} or set ppo.share_remainder to rotate or drop"
        )
    if ppo.order == "critics_first":
        for index, critic in enumerate(config.critics):
            if critic.value_clip is not None:
                errors.append(
                    f"critics.{index}.value_clip: got {critic.value_clip} with ppo.order critics_first, which has no "
                    "values from before the update; set ppo.order values_first or leave it out"
                )
    return errors


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """Field names of the section that a location of a pydantic error lies in."""
    model: Any = Config
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
        for arg in get_args(model):
            if isinstance(arg, type) and issubclass(arg, BaseModel):
                model = arg
    return list(getattr(model, "model_fields", {}))


def _describe(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(tuple(error["loc"][:-1]))
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing, need a value"
    return f"{where}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b.0.c=value` to its path and its YAML value."""
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise ConfigError([f"override: got {text!r}, need key=value"])
    try:
        return key.split("."), yaml.safe_load(value) if value else ""
    except yaml.YAMLError as e:
        raise ConfigError([f"override {key}: value {value!r} is not YAML: {e}"]) from e


def apply_override(tree: Any, path: list[str], value: Any, full: str = "") -> None:
    """Set one value in a tree of dicts and lists; `*` stands for every item of a list."""
    full = full or ".".join(path)
    head, rest = path[0], path[1:]
    if isinstance(tree, list):
        if head != "*" and not (head.isdigit() and int(head) < len(tree)):
            raise ConfigError([f"override {full}: got index {head!r}, need 0..{len(tree) - 1} or *"])
        for i in range(len(tree)) if head == "*" else [int(head)]:
            if rest:
                apply_override(tree[i], rest, value, full)
            else:
                tree[i] = value
        return
    if not isinstance(tree, dict):
        raise ConfigError([f"override {full}: {head!r} lies inside a plain value"])
    if rest:
        if not isinstance(tree.get(head), dict | list):
            tree[head] = {}
        apply_override(tree[head], rest, value, full)
    else:
        tree[head] = value


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides and validate.

    Raises:
        ConfigError: with all errors at once.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read: {e.strerror}"]) from e
    except yaml.YAMLError as e:
        raise ConfigError([f"{path}: is not YAML: {e}"]) from e
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: got {type(tree).__name__}, need a mapping of sections"])
    tree.pop("definitions", None)  # a place for YAML anchors
    for text in overrides or []:
        apply_override(tree, *parse_override(text))
    return build_config(tree)


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a plain tree.

    Raises:
        ConfigError: with all errors at once.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError([_describe(err) for err in e.errors()]) from None
    errors = cross_checks(config)
    if errors:
        raise ConfigError(errors)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
