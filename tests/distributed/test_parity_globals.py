"""Nothing reads a group, rank or size of `megatron.core.parallel_state`: every read is trapped and fails the run."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import TIED_COPY, read, write
from parity_models import ACTOR, CRITIC, save_model
from parity_world import run_forked

from asyppo_megatron.config import Config

RANKS = 4
# Not reads of a group or rank: the buffer that Megatron-Core cannot do without, and whether there are any groups (no).
HARMLESS = {
    "get_global_memory_buffer",
    "get_global_symmetric_memory_buffer",
    "get_nccl_options",
    "is_initialized",
    "is_unitialized",
    "model_parallel_is_initialized",
    # Of 0.19's sharing of weights among replicas, which it asks for when it builds a layer and when it sums a gradient
    # norm; no argument could answer instead, and there being no global groups, the answer is that there is none.
    "get_gtp_weight_remat_group",
    "get_gtp_weight_remat_rank",
    "get_expert_gtp_weight_remat_group",
    "get_expert_gtp_weight_remat_rank",
}
# Get no group from a row-parallel layer (0.16), whose sum over ranks is made elsewhere.
WITHOUT_COMMUNICATION = {"linear_with_grad_accumulation_and_async_allreduce", "linear_with_frozen_weight"}
READS = re.compile(r"(get|is|has|model_parallel_is)_")
GLOBALS = re.compile(r"_[A-Z_]+_(GROUP|GROUPS|GLOO|RANKS?|WORLD_SIZE)(_[A-Z_]+)?")


def make_config(directory: Path, name: str) -> Config:
    rates: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 3}
    actor: dict[str, Any] = {"ranks": "0-3", "layout": {"tp": 2, "pp": 2}, "optimizer": rates}
    critics: list[dict[str, Any]] = [
        {"ranks": "0-1", "layout": {"tp": 2}, "optimizer": {"lr": 3e-3, "decay": "linear"}},
        {"ranks": "2-3", "layout": {"cp": 2}, "optimizer": {"lr": 2e-3}},
    ]
    if name == "untied":
        actor |= {"layout": {"tp": 2, "cp": 2}, "recompute": "full", "precision": "bf16", "fused_head": True}
        actor |= {"optimizer": rates | {"distributed": False}}
        critics[0] |= {"ranks": "0-3", "layout": {"tp": 2, "pp": 2}}
        critics[1] |= {"ranks": "2", "layout": {}, "recompute": "selective"}
    return Config(
        run_dir=directory / f"run-{name}",
        num_steps=2,
        actor={"model": directory / name, "precision": "fp32", **actor},
        critics=[{"model": directory / "critic", "precision": "fp32", **c} for c in critics],
        ppo={"kl": {"coef": 0.01}} if name == "tied" else {},
        rollout={"prompts_per_step": 3, "responses_per_prompt": 4},
        checkpoint={"every": 1, "async_save": name == "tied"},
        data={"train": directory / "none.jsonl"},
    )


def without_context_parallelism(config: Config) -> Config:
    """The same roles with data parallelism in the place of context parallelism."""

    def plain(role: Any) -> Any:
        return role.model_copy(update={"layout": role.layout.model_copy(update={"cp": 1})})

    return config.model_copy(update={"actor": plain(config.actor), "critics": tuple(map(plain, config.critics))})


class Spy:
    """Replaces every reader of `parallel_state`, where it is defined and where it was imported by name."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.reads: list[str] = []
        self.module = parallel_state
        originals = {
            name: value
            for name, value in vars(parallel_state).items()
            if callable(value) and READS.match(name) and value.__module__ == parallel_state.__name__
        }
        self.traps = {name: self.trap(name) for name in originals if name not in HARMLESS}
        by_id = {id(originals[name]): trap for name, trap in self.traps.items()}
        # Megatron's way to ask for the global group where it was given none; without global groups it would go on with
        # none, which to torch means the whole world.
        from megatron.core.utils import get_tensor_model_parallel_group_if_none as default_group

        by_id[id(default_group)] = self.only_given_groups(default_group)
        for module in [m for n, m in sys.modules.items() if n.startswith(("megatron", "asyppo_megatron"))]:
            for name, value in list(vars(module).items()):
                if id(value) in by_id:
                    setattr(module, name, by_id[id(value)])
        parallel_state.__class__ = self.watched_module()

    def trap(self, name: str) -> Callable[..., Any]:
        def read(*_: Any, **__: Any) -> Any:
            self.caught(name)

        return read

    def only_given_groups(self, default_group: Callable[..., Any]) -> Callable[..., Any]:
        def read(tp_group: Any, *args: Any, **kwargs: Any) -> Any:
            if tp_group is None and sys._getframe(1).f_code.co_name not in WITHOUT_COMMUNICATION:
                self.caught(default_group.__name__)
            return default_group(tp_group, *args, **kwargs)

        return read

    def caught(self, name: str) -> None:
        """Note the read, in case somebody swallows the exception."""
        frames = [f for f in traceback.extract_stack()[:-2] if "importlib" not in f.filename][-3:]
        callers = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
        self.reads.append(f"{name} by {callers}")
        raise RuntimeError(f"parallel_state: read of {self.reads[-1]}")

    def watched_module(self) -> type:
        """A module type that also traps reads of its group variables from outside."""
        spy, module_type = self, type(sys)

        class Watched(module_type):  # type: ignore[misc, valid-type]
            def __getattribute__(self, name: str) -> Any:
                if GLOBALS.fullmatch(name):
                    spy.caught(name)
                return module_type.__getattribute__(self, name)

        return Watched


def make_models(directory: Path) -> None:
    for tied in (True, False):
        save_model(directory / ("tied" if tied else "untied"), ACTOR, tied=tied, seed=int(tied))
    save_model(directory / "critic", CRITIC, tied=True, seed=5)


def run_spied(device: torch.device, store: Any, directory: Path, names: list[str]) -> None:
    """Train two steps with pushes and saves, export, resume after the first and train on; all of it spied on."""
    import torch.distributed as dist
    from parity_loop import build_run
    from parity_roles import gather
    from safetensors.torch import load_file

    from asyppo_megatron.convert.names import named_parameters
    from asyppo_megatron.run import export_models
    from asyppo_megatron.train import train

    spy = Spy()
    steps: list[int] = []
    exact: dict[str, dict[str, bool]] = {}
    exported: dict[str, dict[str, bool]] = {}
    without_context: dict[str, dict[str, bool]] = {}
    try:
        for name in names:
            config = make_config(directory, name)
            run = build_run(config, device, store)
            train(run, 0)
            run.checkpoints.finish(wait=True)
            export_models(run)
            steps.append(run.checkpoints.latest())
            dist.barrier()  # the exports are complete
            whole = {role: gather(trained, lambda p: p) for role, trained in run.world.roles.items()}
            for role, tensors in whole.items():
                files = (config.run_dir / "hf" / role).glob("*.safetensors")
                file = {n: t for path in files for n, t in load_file(path).items()}
                same = all(torch.equal(file[n.removeprefix(TIED_COPY)].float(), t) for n, t in tensors.items())
                exported.setdefault(name, {})[role] = same
            relaid = build_run(without_context_parallelism(config), device, store)
            relaid.checkpoints.load(2)
            for role, trained in relaid.world.roles.items():
                tensors = gather(trained, lambda p: p)
                same = all(torch.equal(t, tensors[n]) for n, t in whole[role].items())
                without_context.setdefault(name, {})[role] = same
            relaid.checkpoints.close()
            again = build_run(config, device, store)
            again.checkpoints.load(1)
            train(again, 1)
            for role, old in run.world.roles.items():
                new = named_parameters(again.world.roles[role].module)
                same = all(torch.equal(p, new[n]) for n, p in named_parameters(old.module).items())
                exact.setdefault(name, {})[role] = same
            again.checkpoints.close()
            run.checkpoints.close()
    finally:
        facts = {"reads": spy.reads, "trapped": sorted(spy.traps), "steps": steps, "exact": exact}
        facts |= {"exported": exported, "without_context": without_context}
        write(directory / f"rank-{dist.get_rank()}", {}, facts)


def run_reads(device: torch.device, store: Any, directory: Path) -> None:
    """Code that does read, in every way there is: the spy must see each."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel, utils
    from megatron.core.tensor_parallel import layers

    spy = Spy()
    from megatron.core.parallel_state import get_data_parallel_rank  # imported after the spy

    ways = {
        "through the module": parallel_state.get_tensor_model_parallel_group,
        "imported by name before": layers.get_tensor_model_parallel_rank
        if hasattr(layers, "get_tensor_model_parallel_rank")
        else parallel_state.get_tensor_model_parallel_rank,
        "imported by name after": get_data_parallel_rank,
        "inside Megatron": lambda: tensor_parallel.mappings.reduce_from_tensor_model_parallel_region(torch.ones(1)),
        "a variable": lambda: parallel_state._TENSOR_MODEL_PARALLEL_GROUP,
        "no group given": lambda: utils.get_tensor_model_parallel_group_if_none(None),
    }
    caught = []
    for way, reading in ways.items():
        before = len(spy.reads)
        try:
            reading()
        except RuntimeError as e:
            if len(spy.reads) > before and "parallel_state: read of" in str(e):
                caught.append(way)
    parallel_state.get_global_memory_buffer()  # allowed
    write(directory / f"reads-{dist.get_rank()}", {}, {"caught": caught, "ways": list(ways), "reads": spy.reads})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("globals")
    run_forked(0, path, make_models, path)
    return path


def test_the_spy_catches_every_way_of_reading(directory: Path) -> None:
    run_forked(1, directory, run_reads, directory)
    _, facts = read(directory / "reads-0")
    assert facts["caught"] == facts["ways"]
    assert "test_parity_globals.py" in facts["reads"][0]


@pytest.fixture(scope="module")
def spied(directory: Path) -> Path:
    failure = None
    try:
        run_forked(RANKS, directory, run_spied, directory, ["tied", "untied"])
    except RuntimeError as e:
        failure = e
    reads = [read for path in sorted(directory.glob("rank-*.json")) for read in json.loads(path.read_text())["reads"]]
    assert reads == []
    if failure is not None:
        raise failure
    return directory


def test_training_saving_resuming_pushing_and_exporting_read_no_global_group_or_rank(spied: Path) -> None:
    for rank in range(RANKS):
        _, facts = read(spied / f"rank-{rank}")
        assert facts["reads"] == []
        assert facts["steps"] == [2, 2]
        assert len(facts["trapped"]) > 50
    assert sorted(p.name for p in (spied / "run-tied/hf").iterdir()) == ["actor", "critic_0", "critic_1"]
    assert [p.name for p in (spied / "run-tied/weights").iterdir()] == ["v00000002"]


def test_a_resumed_run_ends_with_the_same_bits_in_every_role_and_layout(spied: Path) -> None:
    for rank in range(RANKS):
        _, facts = read(spied / f"rank-{rank}")
        assert facts["exact"].keys() == {"tied", "untied"}
        different = [(run, role) for run, roles in facts["exact"].items() for role, same in roles.items() if not same]
        assert not different, f"rank {rank}"


@pytest.mark.parametrize("fact", ["exported", "without_context"])
def test_exports_and_checkpoints_hold_every_layouts_weights(fact: str, spied: Path) -> None:
    """Of replicas over data and context parallelism too; a checkpoint loads without context parallelism."""
    for rank in range(RANKS):
        _, facts = read(spied / f"rank-{rank}")
        different = [(run, role) for run, roles in facts[fact].items() for role, same in roles.items() if not same]
        assert facts[fact].keys() == {"tied", "untied"} and not different, f"rank {rank}"
