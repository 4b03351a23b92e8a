"""The command line: asyppo train | demo | eval | report."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyppo_megatron.config import Config, ConfigError, load_config

DEMO_CONFIG = Path("model_configs/runs/demo.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return int(arguments.run(arguments) or 0)
    except ConfigError as e:
        print(f"configuration: {len(e.errors)} error(s)\n{e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start the same command again to resume", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


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
    demo = command("demo", _demo, "make the demo's data and base models, then train")
    demo.add_argument("--config", type=Path, default=DEMO_CONFIG)
    demo.add_argument("--data", type=Path, default=Path("runs/demo-data"))
    demo.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate = command("eval", _eval, "evaluate a Hugging Face model on the data.eval sets of a configuration")
    evaluate.add_argument("config", type=Path)
    evaluate.add_argument("--model", type=Path, help="Hugging Face directory; default: the run's exported actor")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    report = command("report", _report, "draw a run's learning curve")
    report.add_argument("run_dir", type=Path)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    train_config(load_config(arguments.config, arguments.overrides))


def train_config(config: Config) -> None:
    """Check everything, then train here (or as the rank that a launcher started)."""
    from asyppo_megatron.launch.local import is_launched, run_ranks
    from asyppo_megatron.preflight import check_run

    check_run(config)
    from asyppo_megatron import train  # imports torch and Megatron once, before the ranks are forked

    if is_launched():
        train.main_rank(config)
    else:
        run_ranks(config.num_ranks, lambda rank: train.main_rank(config))


def _demo(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.demo.run import prepare_base_models

    config = load_config(arguments.config, arguments.overrides)
    prepare_base_models(arguments.data)
    train_config(config)
    from asyppo_megatron.observability.report import summary

    print(summary(config.run_dir))


def _eval(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.rollout.evaluate import evaluate_model

    config = load_config(arguments.config, arguments.overrides)
    model = arguments.model or config.run_dir / "hf" / "actor"
    for result in evaluate_model(config, model):
        parts = [f"greedy {result.greedy:.4f}"] if result.greedy is not None else []
        parts += [f"avg@{result.k} {result.avg_at_k:.4f}"] if result.avg_at_k is not None else []
        print(f"{result.name}: {', '.join(parts)} on {result.num_problems} problems ({result.num_skipped} skipped)")


def _report(arguments: argparse.Namespace) -> None:
    from asyppo_megatron.observability.report import learning_curve

    print(learning_curve(arguments.run_dir))


if __name__ == "__main__":
    sys.exit(main())
