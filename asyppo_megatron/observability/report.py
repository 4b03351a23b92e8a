"""A finished run, or one under way, as a picture and as a few lines."""

from __future__ import annotations

import os
from pathlib import Path

from asyppo_megatron.observability.metrics import METRICS_FILE, Row, read_metrics, read_series
from asyppo_megatron.observability.timing import seconds_by_phase

PICTURE = "learning_curve.png"


def _read_run(run_dir: Path) -> list[Row]:
    path = run_dir / METRICS_FILE
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        raise ValueError(
            f"{path}: got no metrics, need at least one step; give the directory of a run that has started"
        )
    return rows


def summary(run_dir: Path) -> str:
    """What a run did, in lines: each curve's first and last value, seconds by phase of a mean step, the picture.

    Raises:
        ValueError: the run has no metrics yet.
    """
    rows = _read_run(run_dir)
    steps = [row for row in rows if "reward" in row]
    timed = [seconds_by_phase(row) for row in steps]
    total = sum(seconds.get("step", 0.0) for seconds in timed)
    lines = [f"{run_dir}: {len(steps)} steps" + (f" in {total:.1f} s" if total else "")]
    names = [name for _, panel in _panels(rows) for name in panel]
    for name in names:
        _, values = read_series(rows, name)
        if values:
            lines.append(f"  {name:<32} {values[0]:>9.4g} -> {values[-1]:<9.4g}")
    phases = list(dict.fromkeys(name for seconds in timed for name in seconds))
    if phases:
        means = (f"{name} {sum(s.get(name, 0.0) for s in timed) / len(timed):.2f}" for name in phases)
        lines.append("  seconds a step: " + ", ".join(means))
    if (run_dir / PICTURE).exists():
        lines.append(f"  learning curve: {run_dir / PICTURE}")
    return "\n".join(lines)


def _panels(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Title and metrics of each panel; critics and evaluation sets as the rows have them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [
        ("reward", ["reward"]),
        ("accuracy", ["accuracy", *(name for name in names if name.startswith("eval/"))]),
        ("entropy (nats)", ["entropy"]),
        ("value-std over the critics", ["value_std"]),
        ("explained variance", [name for name in names if name.startswith("explained_variance/")]),
        ("response length (tokens)", ["response_length"]),
    ]


def learning_curve(run_dir: Path) -> Path:
    """Draw `learning_curve.png` from a run's metrics; atomic, so a viewer never sees half a picture.

    Raises:
        ValueError: the run has no metrics yet.
    """
    # Here and not above: it costs a second that ranks which draw nothing should not pay. The figure is made without
    # pyplot, which keeps global state and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _read_run(run_dir)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, names) in zip(axes.flat, _panels(rows), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        for name in names:
            steps, values = read_series(rows, name)
            if steps:
                label = name.removeprefix("explained_variance/").removeprefix("eval/")
                axis.plot(steps, values, label=label, linewidth=1.4, marker="o" if name.startswith("eval/") else None)
        if len(names) > 1:
            axis.legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(run_dir.resolve().name)
    picture = run_dir / PICTURE
    partial = picture.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    os.replace(partial, picture)
    return picture
