"""One row of metrics a step: appended to `metrics.jsonl`, and to wandb when it is switched on.

The names are public (a change is noted in CHANGELOG.md). Fractions are in [0, 1], entropies and KL in nats,
lengths in tokens; `<phase>` and `<name>` are free, critics count from 0:

    step  reward  accuracy  entropy  value_std  clip_fraction  approx_kl
    masked_advantage_fraction  masked_entropy_fraction  explained_variance/critic_0 ...
    loss/actor  loss/critic_0 ...  grad_norm/actor  grad_norm/critic_0 ...  lr/actor  lr/critic_0 ...
    prompt_length  response_length  truncation_rate
    seconds/<phase>  tokens/<phase>  memory/peak_gb
    eval/<name>/greedy  eval/<name>/avg@k

JSON knows no NaN and no infinity: such a value becomes null, and `nonfinite` maps its name to what it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
WandbMode = Literal["disabled", "offline", "online"]


class Scalar(Protocol):
    """A 0-dim tensor or numpy scalar."""

    def item(self) -> bool | int | float: ...


Value = bool | int | float | str | None | Scalar
Row = dict[str, Any]


def plain_value(name: str, value: Value) -> bool | int | float | str | None:
    """A metric as a Python value; reads a tensor on the host, so call it once a step."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return value.item()
    except (AttributeError, RuntimeError, ValueError):  # no scalar type, or a tensor or array of several elements
        raise ValueError(
            f"metric {name}: got {type(value).__name__}, need one number or a string; reduce it before logging"
        ) from None


def encode_row(row: Mapping[str, Value]) -> str:
    """One line of strict JSON, without its newline; NaN and infinities as null, listed under `nonfinite`."""
    values = {name: plain_value(name, value) for name, value in row.items()}
    nonfinite = {name: str(v) for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    plain: dict[str, Any] = {name: None if name in nonfinite else value for name, value in values.items()}
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return json.dumps(plain, allow_nan=False)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file, oldest first. A last line cut off by a crash is left out.

    Args:
        path: the file, or the run directory that holds it.
    """
    path = path / METRICS_FILE if path.is_dir() else path
    lines = path.read_text().split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or cut off
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: got a line that is not JSON ({error}); remove it and try again"
            ) from None
    return rows


def read_series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where a row has it as a number."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in pairs], [float(value) for _, value in pairs]


class MetricsLog:
    """Append-only log of a run; one process writes it (rank 0).

    Each row is one write and one fsync, so a killed run loses no finished step and leaves no half line behind.

    Args:
        run_dir: `metrics.jsonl` lies here; made when missing.
        wandb: `offline` needs no network; both modes but `disabled` need the `wandb` extra.
        wandb_project: project that the run is listed under.
        config: the resolved configuration, shown by wandb.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: WandbMode = "disabled",
        wandb_project: str = "asyppo",
        config: Mapping[str, Any] | None = None,
    ):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / METRICS_FILE
        self._wandb = None if wandb == "disabled" else _start_wandb(run_dir, wandb, wandb_project, config)
        self._drop_cut_line()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def log(self, row: Mapping[str, Value]) -> None:
        """Append one row; it needs a `step`. Several rows may share one (training, evaluation)."""
        if not isinstance(row.get("step"), int):
            raise ValueError(
                f"metrics row: got step {row.get('step')!r}, need an integer; log rows as {{'step': n, ...}}"
            )
        line = (encode_row(row) + "\n").encode()
        if os.write(self._fd, line) != len(line):
            raise OSError(f"{self.path}: step {row['step']} was written in part; is the disk full?")
        os.fsync(self._fd)
        if self._wandb is not None:
            # No `step=`: wandb refuses steps that go back, which a resumed run does. Its step metric is `step`.
            self._wandb.log({name: plain_value(name, value) for name, value in row.items()})

    def truncate_after(self, step: int) -> int:
        """Drop the rows of later steps, those of a run that went on after the checkpoint now resumed from.

        Atomic: the file is the old one or the new one. Returns the number of dropped rows.
        """
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) == len(rows):
            return 0
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as out:
            out.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, self.path)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        logger.info("%s: dropped %d rows after step %d", self.path, len(rows) - len(kept), step)
        return len(rows) - len(kept)

    def close(self) -> None:
        """Close the file and finish the wandb run; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_cut_line(self) -> None:
        """A machine that went down in the middle of a write leaves half a line: the next row must not join it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: dropped its last line, which was cut off", self.path)
            os.truncate(self.path, whole)


def _start_wandb(run_dir: Path, mode: WandbMode, project: str, config: Mapping[str, Any] | None) -> Any:
    """A wandb run that keeps its id in the run directory, so that a resumed run goes on under it."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"logging.wandb: got {mode!r} without the package wandb, need it installed; "
            "do `pip install 'asyppo_megatron[wandb]'` or set logging.wandb=disabled"
        ) from error
    id_file = run_dir / "wandb_id"
    resumed = id_file.exists()
    run_id = id_file.read_text().strip() if resumed else secrets.token_hex(4)
    run = wandb.init(
        project=project,
        name=run_dir.name,
        dir=str(run_dir),
        id=run_id,
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline runs merge by their id when they are uploaded
        config=dict(config or {}),
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="step")
    id_file.write_text(run_id + "\n")
    logger.info("wandb (%s): run %s in %s%s", mode, run_id, run_dir, ", resumed" if resumed else "")
    return run
