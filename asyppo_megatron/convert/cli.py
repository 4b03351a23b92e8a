"""`asyppo convert to-megatron | to-hf`, also behind the scripts of tools/convert."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from asyppo_megatron.convert.atomic import check_target
from asyppo_megatron.convert.dry_run import dry_run
from asyppo_megatron.convert.hf_io import INDEX, SINGLE, HFCheckpoint
from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.pool import default_processes
from asyppo_megatron.convert.table import Role
from asyppo_megatron.convert.to_hf import megatron_to_hf
from asyppo_megatron.convert.to_megatron import HFSource, Layout, hf_to_megatron
from asyppo_megatron.convert.verify import check_logits, check_tensors, has_comparable_logits
from asyppo_megatron.models.spec import ModelSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "keep": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two directions and their options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="to-megatron | to-hf")
    to_megatron = directions.add_parser("to-megatron", help="Hugging Face -> Megatron distributed checkpoint")
    to_megatron.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    to_megatron.add_argument("--head", choices=("zero", "random"), default="zero", help="a new critic's value head")
    to_megatron.add_argument("--seed", type=int, default=0, help="of a random value head")
    to_hf = directions.add_parser("to-hf", help="Megatron distributed checkpoint -> Hugging Face")
    to_hf.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="distributed checkpoint")
    to_hf.add_argument(
        "--config", type=Path, metavar="DIR", help="where config.json and the tokenizer are, if not there"
    )
    to_hf.add_argument("--prefix", default="", help="of the model's keys in a checkpoint of several models: actor.")
    for p in (to_megatron, to_hf):
        p.add_argument("--out", type=Path, metavar="DIR", help="directory to make")
        p.add_argument("--tp", type=int, default=1, help="tensor-parallel size to cut tensors for (loads in any other)")
        p.add_argument("--pp", type=int, default=1, help="pipeline-parallel size that the model must fit")
        p.add_argument("--ep", type=int, default=1, help="expert-parallel size that the model must fit")
        p.add_argument("--role", choices=("actor", "critic"), help="default: what config.json says")
        p.add_argument("--dtype", choices=DTYPES, default="keep", help="of the tensors written")
        p.add_argument("--verify", action="store_true", help="compare all tensors, and logits of small models")
        p.add_argument("--dry-run", action="store_true", help="check names and shapes, write nothing")
        p.add_argument("--force", action="store_true", help="replace an existing target")
        p.add_argument("--processes", type=int, default=default_processes(), help="default: %(default)s")
        p.add_argument("--quiet", action="store_true", help="no progress")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _role(given: Role | None, path: Path) -> Role:
    if given is not None:
        return given
    try:
        architectures = json.loads((path / "config.json").read_text()).get("architectures") or [""]
    except (OSError, ValueError):
        return "actor"  # what is wrong with the config is said where it is read
    return "critic" if architectures[0].endswith("ForTokenClassification") else "actor"


def _target(args: argparse.Namespace) -> Path:
    if args.out is None:
        raise ValueError("--out: missing, need a directory to make; give one or use --dry-run")
    check_target(args.out, args.force)
    return args.out


def _to_megatron(args: argparse.Namespace) -> None:
    role, layout = _role(args.role, args.hf), Layout(args.tp, args.pp, args.ep)
    spec = ModelSpec.from_hf(args.hf)
    layout.check(spec)
    dtype = DTYPES[args.dtype]
    if args.dry_run:
        _say(dry_run(args.hf, role, args.tp))
        has_weights = any((args.hf / name).exists() for name in (SINGLE, INDEX))
        if has_weights:
            HFSource(args.hf, role, dtype, None)
        _say("the checkpoint's tensors agree too" if has_weights else "no weights there: config checked only")
        return
    target = _target(args)
    source = HFSource(args.hf, role, dtype, args.seed if args.head == "random" else None)

    def check(partial: Path) -> None:
        result = MegatronCheckpoint(partial, spec, role)
        count = check_tensors(source, result, processes=args.processes, quiet=args.quiet)
        same = source.is_unchanged and has_comparable_logits(spec)
        worst = check_logits(args.hf, partial, spec, critic=role == "critic") if same else None
        _say(_verified(count, worst))

    hf_to_megatron(
        source, args.hf, target, role=role, layout=layout, force=args.force, processes=args.processes,
        quiet=args.quiet, check=check if args.verify else None,
    )  # fmt: skip


def _to_hf(args: argparse.Namespace) -> None:
    config = args.config or args.megatron
    role = _role(args.role, config)
    spec = ModelSpec.from_hf(config)
    Layout(args.tp, args.pp, args.ep).check(spec)
    dtype = DTYPES[args.dtype]
    source = MegatronCheckpoint(args.megatron, spec, role, prefix=args.prefix)
    if args.dry_run:
        _say(dry_run(config, role, args.tp))
        _say("the checkpoint's tensors agree too")
        return
    target = _target(args)

    def check(partial: Path) -> None:
        result = HFCheckpoint(partial)
        count = check_tensors(result, source, processes=args.processes, quiet=args.quiet, to_hf_dtype=dtype)
        same = has_comparable_logits(spec) and all(
            source.info(n).dtype == (dtype or source.info(n).dtype) for n in source.entries
        )
        worst = None
        if same:
            worst = check_logits(partial, args.megatron, spec, critic=role == "critic", prefix=args.prefix)
        _say(_verified(count, worst))

    megatron_to_hf(
        source, config, target, role=role, dtype=dtype, force=args.force, processes=args.processes,
        quiet=args.quiet, check=check if args.verify else None,
    )  # fmt: skip


def _verified(count: int, worst: float | None) -> str:
    logits = "" if worst is None else f", logits agree to {worst:.1e}"
    return f"verified: {count} tensors are equal{logits}"


def run(args: argparse.Namespace) -> int:
    """Convert as the arguments say. Returns the exit code; a user's mistake is one line on stderr."""
    torch.set_num_threads(1)  # processes share the cores, and forking wants no threads
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        _to_megatron(args) if args.direction == "to-megatron" else _to_hf(args)
    except (ValueError, OSError) as e:
        sys.stderr.write(f"error: {e}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _end(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    """Entry point of the scripts."""
    parser = argparse.ArgumentParser(prog="asyppo convert", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
