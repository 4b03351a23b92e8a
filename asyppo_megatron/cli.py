"""The command line: asyppo train | serve | check | launch | demo | eval | convert and more (`asyppo --help`)."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyppo_megatron.config import Config, ConfigError, EvalSetConfig, load_config
from asyppo_megatron.launch.options import add_check_options, add_launch_options, add_place_options, check, launch

DEMO_CONFIG = Path("model_configs/runs/demo.yaml")
PRETRAIN_STEPS = 50  # VAPO, arXiv 2504.05118
DEMO_GPU_CONFIG = Path("model_configs/runs/demo_gpu.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:
        from asyppo_megatron.convert.cli import main as convert

        return convert(argv[1:])
    arguments = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Asking torch for a GPU must not start CUDA in this process: CUDA does not survive the fork into ranks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    try:
        return int(arguments.run(arguments) or 0)
    except ConfigError as e:
        print(f"configuration: {len(e.errors)} error(s)\n{e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        signum, is_saved = getattr(e, "signum", signal.SIGINT), getattr(e, "is_saved", False)
        how = " after a checkpoint" if is_saved else ""
        print(f"stopped by {signal.Signals(signum).name}{how}; start the same command again to resume", file=sys.stderr)
        return 75 if is_saved else 128 + signum
    except (ValueError, RuntimeError, OSError) as e:
        print(f"{getattr(e, 'traceback', '')}error: {e}", file=sys.stderr)
        return getattr(e, "exit_code", 1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command; argparse alone would take no key=value that stands behind an option."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asyppo", description="AsyPPO on Megatron-Core")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "train a run, or resume it")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    add_place_options(train)
    serve = command("serve", _serve, "supervise the SGLang engines of this node for a run")
    serve.add_argument("config", type=Path)
    serve.add_argument("--address-file", type=Path, metavar="FILE", help="default: run_dir/agents/NODE.json")
    serve.add_argument("--linger", type=float, metavar="S", help="end when no run has been there for so long")
    serve.add_argument("overrides", nargs="*", metavar="key=value")
    add_check_options(command("check", check, "check a configuration, its files, and whether it fits an allocation"))
    add_launch_options(command("launch", launch, "run a recipe through NeMo-Run, here or on a Slurm cluster"))
    demo = command("demo", _demo, "make the demo's data and base models, then train")
    default = f"default: {DEMO_CONFIG}, or {DEMO_GPU_CONFIG} where there are 1-3 GPUs"
    demo.add_argument("--config", type=Path, help=default)
    demo.add_argument("--data", type=Path, default=Path("runs/demo-data"))
    demo.add_argument("overrides", nargs="*", metavar="key=value")
    pretrain = command(
        "pretrain-critics", _pretrain_critics, "train the critics of a run on its unchanged policy, before the run"
    )
    pretrain.add_argument("config", type=Path)
    pretrain.add_argument("--steps", type=_count, default=PRETRAIN_STEPS, metavar="N", help=f"default {PRETRAIN_STEPS}")
    pretrain.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate = command("eval", _eval, "evaluate a Hugging Face model on the data.eval sets of a configuration")
    evaluate.add_argument("config", type=Path)
    evaluate.add_argument("--model", type=Path, help="Hugging Face directory; default: the run's exported actor")
    evaluate.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=PATH",
        help="evaluate this JSONL file too, or in place of the set of that name; may be given several times",
    )
    evaluate.add_argument("--samples", type=_count, metavar="K", help="avg@K beside the greedy accuracy (eval.samples)")
    evaluate.add_argument("--out", type=Path, help="directory of the per-problem results; default: run_dir/eval/MODEL")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    _prepare_parsers(command("prepare", _no_command, "bring data or a small model into the form that runs read"))
    plan = command("plan", _plan, "memory, work and layout of one or several configurations, without running them")
    plan.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    plan.add_argument("--gpu", default="H100", help="A100, H100 or H200; default: %(default)s")
    plan.add_argument("--response-tokens", type=_count, metavar="N", help="mean response; default: half of the limit")
    plan.add_argument("--set", dest="changes", action="append", default=[], metavar="key=value", help="for all CONFIGs")
    doctor = command("doctor", _doctor, "what this machine lacks for a run")
    doctor.add_argument("--config", type=Path, help="also check what this run needs")
    doctor.add_argument("--dir", type=Path, default=Path("runs"), help="where runs write; default: %(default)s")
    report = command("report", _report, "draw a run's learning curve")
    report.add_argument("run_dir", type=Path)
    # Only for the list of commands: `main` hands the words behind it to its own parser, whose module needs torch.
    commands.add_parser("convert", help="convert checkpoints between Hugging Face and Megatron")
    return parser


def _prepare_parsers(prepare: argparse.ArgumentParser) -> None:
    kinds = prepare.add_subparsers(required=True, metavar="data|model")
    data = kinds.add_parser("data", help="JSONL of any keys to {id, problem, answer}")
    data.set_defaults(run=_prepare_data)
    data.add_argument("--input", type=Path, required=True, metavar="FILE")
    data.add_argument("--out", type=Path, required=True, metavar="FILE")
    data.add_argument("--problem-key", default="question")
    data.add_argument("--answer-key", default="answer")
    data.add_argument("--id-key", default="id", help="rows without it are numbered")
    data.add_argument("--answer-after", default="", metavar="TEXT", help="the answer follows the last TEXT ('####')")
    model = kinds.add_parser("model", help="a small randomly initialised Qwen3 around a tokenizer")
    model.set_defaults(run=_prepare_model)
    model.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    model.add_argument("--out", type=Path, required=True, metavar="DIR")
    sizes = {"hidden": 128, "layers": 2, "heads": 4, "kv-heads": 2, "head-dim": 32, "ffn": 256, "positions": 4096}
    for name, default in sizes.items():
        model.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"default {default}")
    model.add_argument("--vocab-size", type=_count, metavar="N", help="default: the tokenizer's, to a multiple of 128")
    model.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True, help="output layer = embedding")
    model.add_argument("--untied", dest="tied", action="store_false", help="the same as --no-tied")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--force", action="store_true", help="replace an existing directory")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a number >= 1")
    return int(text)


def _named_path(text: str) -> tuple[str, Path]:
    name, sep, path = text.partition("=")
    if not sep or not name or not path:
        raise argparse.ArgumentTypeError(f"got {text!r}, need NAME=PATH")
    return name, Path(path)


def _no_command(arguments: argparse.Namespace) -> None:
    raise AssertionError("argparse requires a command")


def _train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if config.num_steps and not config.trains_policy:
        logging.warning(
            "no step of this run updates the policy: num_steps %d, ppo.critic_warmup_steps %d, ppo.policy_every %d",
            config.num_steps,
            config.ppo.critic_warmup_steps,
            config.ppo.policy_every,
        )
    from asyppo_megatron.launch.command import place_of, train_config

    train_config(config, place_of(arguments.nodes, arguments.node, arguments.rendezvous), arguments.job)


def _serve(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    from asyppo_megatron.launch.agent import serve
    from asyppo_megatron.launch.command import num_gpus

    logging.basicConfig(level=config.logging.level, format="%(asctime)s %(message)s", force=True)
    print(f"agent ended: {serve(config, num_gpus(), arguments.address_file, arguments.linger)}", file=sys.stderr)


def _pretrain_critics(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.config.methods import pretraining
    from asyppo_megatron.launch.command import train_config

    config, errors = pretraining(load_config(arguments.config, arguments.overrides), arguments.steps)
    if errors:
        raise ConfigError(errors)
    train_config(config)
    print("critics, pre-trained; to start a run from them:")
    for index in range(config.num_critics):
        print(f"  critics.{index}.model={config.run_dir / 'hf' / f'critic_{index}'}")


def _quiet_imports(directory: Path, process: str) -> None:
    """What libraries have to say while they are imported goes to a log file, not to the terminal."""
    import torch  # noqa: F401 - it sets up its logger

    from asyppo_megatron.observability.logs import configure_logging

    configure_logging(directory, process, has_progress=False)


def _demo(arguments: argparse.Namespace) -> None:
    import torch

    # Counted without starting CUDA (see `main`).
    path = arguments.config or (DEMO_GPU_CONFIG if 0 < torch.cuda.device_count() < 4 else DEMO_CONFIG)
    config = load_config(path, arguments.overrides)
    _quiet_imports(arguments.data, "prepare")
    from asyppo_megatron.demo.run import prepare_base_models
    from asyppo_megatron.launch.command import train_config

    prepare_base_models(arguments.data)
    train_config(config)
    from asyppo_megatron.observability.report import summary

    print(summary(config.run_dir))


def _eval(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.rollout.evaluate_model import evaluate_model

    config = _with_eval_options(load_config(arguments.config, arguments.overrides), arguments.sets, arguments.samples)
    model = arguments.model or config.run_dir / "hf" / "actor"
    for result in evaluate_model(config, model, arguments.out):
        parts = [f"greedy {result.greedy:.4f}"] if result.greedy is not None else []
        parts += [f"avg@{result.k} {result.avg_at_k:.4f}"] if result.avg_at_k is not None else []
        print(f"{result.name}: {', '.join(parts)} on {result.num_problems} problems ({result.num_skipped} skipped)")


def _with_eval_options(config: Config, sets: list[tuple[str, Path]], samples: int | None) -> Config:
    """The configuration with --set and --samples in place."""
    by_name = {e.name: e for e in config.data.eval} | {n: EvalSetConfig(name=n, path=p) for n, p in sets}
    data = config.data.model_copy(update={"eval": tuple(by_name.values())})
    evaluation = config.eval if samples is None else config.eval.model_copy(update={"samples": samples})
    return config.model_copy(update={"data": data, "eval": evaluation})


def _prepare_data(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.prepare import DataKeys, prepare_data

    a = arguments
    keys = DataKeys(a.problem_key, a.answer_key, a.id_key, a.answer_after)
    print(f"{a.out}: {prepare_data(a.input, a.out, keys)} problems")


def _prepare_model(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.prepare import ModelSizes, prepare_model

    a = arguments
    sizes = ModelSizes(
        hidden=a.hidden,
        layers=a.layers,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        ffn=a.ffn,
        positions=a.positions,
        vocabulary=a.vocab_size,
        tied=a.tied,
    )
    count = prepare_model(a.tokenizer, a.out, sizes, seed=a.seed, force=a.force)
    print(f"{a.out}: Qwen3 of {count:,} parameters, randomly initialised")


def _plan(arguments: argparse.Namespace) -> int:
    from asyppo_megatron.plan.hardware import ACCELERATORS
    from asyppo_megatron.plan.report import run_plan

    if arguments.gpu not in ACCELERATORS:
        raise ValueError(f"--gpu: got {arguments.gpu}, need one of {', '.join(ACCELERATORS)}")
    configs = [(path.stem, load_config(path, arguments.changes)) for path in arguments.configs]
    text, fits = run_plan(configs, arguments.gpu, arguments.response_tokens)
    print(text)
    return 0 if fits else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from asyppo_megatron.doctor import check_machine, table

    config = None if arguments.config is None else load_config(arguments.config)
    rows = check_machine(arguments.dir, config)
    print(table(rows))
    return 0 if all(row.is_fine for row in rows) else 1


def _report(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.observability.report import learning_curve

    print(learning_curve(arguments.run_dir))


if __name__ == "__main__":
    sys.exit(main())
