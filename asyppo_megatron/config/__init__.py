"""The configuration of a run: frozen pydantic models, every cross-check, one list of all errors.

`load_config` reads YAML, applies `key=value` overrides and either returns a `Config` or raises `ConfigError`
with everything that is wrong. Checks that need a model or a dataset on disk live in `preflight.py`.
"""

from asyppo_megatron.config.algorithm import FilteringConfig, KLConfig, PPOConfig
from asyppo_megatron.config.data import (
    PAPER_SYSTEM_PROMPT,
    CurriculumConfig,
    DataConfig,
    EvalConfig,
    EvalSetConfig,
    SourceConfig,
)
from asyppo_megatron.config.load import (
    ConfigError,
    apply_override,
    build_config,
    dump_config,
    load_config,
    parse_override,
)
from asyppo_megatron.config.rewards import RewardConfig, RewardModelConfig, SandboxConfig
from asyppo_megatron.config.roles import (
    ActorConfig,
    CriticConfig,
    LayoutConfig,
    OptimizerConfig,
    ReferenceConfig,
    RoleConfig,
)
from asyppo_megatron.config.rollout import RolloutConfig, SGLangConfig
from asyppo_megatron.config.run import CheckpointConfig, Config, LoggingConfig
from asyppo_megatron.config.weight_sync import WeightSyncConfig

__all__ = [
    "PAPER_SYSTEM_PROMPT",
    "ActorConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "CurriculumConfig",
    "DataConfig",
    "EvalConfig",
    "EvalSetConfig",
    "FilteringConfig",
    "KLConfig",
    "LayoutConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RoleConfig",
    "RolloutConfig",
    "SGLangConfig",
    "SandboxConfig",
    "SourceConfig",
    "WeightSyncConfig",
    "apply_override",
    "build_config",
    "dump_config",
    "load_config",
    "parse_override",
]
