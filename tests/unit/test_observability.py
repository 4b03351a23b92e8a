"""Metrics survive crashes and resumes, the progress line and the logs say what they should, the curve is drawn."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from asyppo_megatron.observability import progress as progress_module
from asyppo_megatron.observability.logs import configure_logging, log_prefix
from asyppo_megatron.observability.metrics import MetricsLog, encode_row, read_metrics, read_series
from asyppo_megatron.observability.progress import Progress, format_step
from asyppo_megatron.observability.report import learning_curve, summary
from asyppo_megatron.observability.timing import PhaseTimer, seconds_by_phase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clean_logging():
    """Puts the root logger back, whatever the test configured."""
    root, ours = logging.getLogger(), logging.getLogger("asyppo_megatron")
    before = (root.level, ours.level, list(root.handlers))
    yield
    configure_logging(None, "test", stream=io.StringIO())
    root.handlers[:] = before[2]
    root.setLevel(before[0])
    ours.setLevel(before[1])
    logging.captureWarnings(False)


# --- metrics -------------------------------------------------------------------------------------------------------


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log({"step": 0, "reward": 0.25, "tokens/actor": 128})
        assert read_metrics(tmp_path) == [{"step": 0, "reward": 0.25, "tokens/actor": 128}]
        log.log({"step": 1, "reward": torch.tensor(0.5), "entropy": np.float32(0.75), "note": "resumed"})
    assert read_metrics(tmp_path)[1] == {"step": 1, "reward": 0.5, "entropy": 0.75, "note": "resumed"}


def test_nan_and_infinity_become_null_and_are_named():
    row = json.loads(
        encode_row({"step": 3, "loss/actor": math.nan, "grad_norm/actor": torch.tensor(math.inf), "reward": 1.0}),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert row["loss/actor"] is None
    assert row["grad_norm/actor"] is None
    assert row["nonfinite"] == {"loss/actor": "nan", "grad_norm/actor": "inf"}
    assert row["reward"] == 1.0


@pytest.mark.parametrize("value", [torch.zeros(2), np.zeros(2), [1.0], {"a": 1}])
def test_a_value_that_is_no_scalar_is_refused_by_name(value):
    with pytest.raises(ValueError, match="metric entropy: got .*, need one number"):
        encode_row({"step": 0, "entropy": value})


def test_a_row_without_a_step_is_refused(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="got step None, need an integer"):
        log.log({"reward": 1.0})


def test_truncate_after_drops_later_rows_and_logging_goes_on(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(5):
            log.log({"step": step, "reward": step / 10})
        log.log({"step": 2, "eval/held_out/greedy": 0.5})
    with MetricsLog(tmp_path) as log:
        assert log.truncate_after(2) == 2
        assert log.truncate_after(2) == 0
        log.log({"step": 3, "reward": 0.9})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]
    assert read_series(read_metrics(tmp_path), "reward") == ([0, 1, 2, 3], [0.0, 0.1, 0.2, 0.9])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_after_keeps_nonfinite_rows_readable(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log({"step": 0, "loss/actor": math.nan})
        log.log({"step": 1})
        log.truncate_after(0)
    assert read_metrics(tmp_path) == [{"step": 0, "loss/actor": None, "nonfinite": {"loss/actor": "nan"}}]


def test_a_line_cut_off_by_a_crash_is_dropped_and_does_not_join_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "rew')
    assert read_metrics(tmp_path) == [{"step": 0}]
    with MetricsLog(tmp_path) as log:
        log.log({"step": 1})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: got a line that is not JSON"):
        read_metrics(tmp_path)


def test_wandb_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"asyppo_megatron\[wandb\]"):
        MetricsLog(tmp_path, wandb="offline")
    MetricsLog(tmp_path).close()  # disabled: never asked for


def test_wandb_gets_every_row_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    class Run:
        def __init__(self, **arguments):
            self.arguments, self.rows, self.finished = arguments, [], False
            runs.append(self)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            self.finished = True

    class Wandb:
        init = Run

        @staticmethod
        def Settings(**settings):
            return settings

    runs: list[Run] = []
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for step in range(2):
        with MetricsLog(tmp_path, wandb="online", wandb_project="p", config={"seed": 1}) as log:
            log.log({"step": step, "reward": torch.tensor(0.5), "loss/actor": math.nan})
    first, second = runs
    assert first.arguments["id"] == second.arguments["id"]
    assert (first.arguments["mode"], first.arguments["project"], first.arguments["resume"]) == ("online", "p", "allow")
    assert first.rows[0]["reward"] == 0.5
    assert math.isnan(first.rows[0]["loss/actor"])
    assert first.finished and second.finished


def test_wandb_offline_writes_its_files_without_a_network(tmp_path):
    pytest.importorskip("wandb", reason="wandb not installed")
    for step in range(2):
        with MetricsLog(tmp_path, wandb="offline", config={"seed": 1}) as log:
            log.log({"step": step, "reward": 0.5, "loss/actor": math.nan})
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2


# --- progress ------------------------------------------------------------------------------------------------------

ROW = {
    "step": 12,
    "reward": 0.5312,
    "accuracy": 0.625,
    "entropy": 0.84,
    "value_std": 0.0512,
    "seconds/step": 2.04,
    "seconds/generate": 0.9,
    "seconds/actor": 0.7,
}


def test_the_progress_line_holds_the_figures_and_the_seconds_by_phase():
    assert format_step(ROW, 40) == (
        "step 12/40  reward 0.531  accuracy 0.625  entropy 0.840  value-std 0.0512  2.0 s: generate 0.9, actor 0.7"
    )


def test_metrics_that_are_absent_or_nan_are_left_out_of_the_line():
    assert format_step({"step": 1, "reward": None}, 4) == "step 1/4"
    assert format_step({"step": 1, "seconds/actor": 1.0, "seconds/sync": 0.5}, 4) == (
        "step 1/4  1.5 s: actor 1.0, sync 0.5"
    )


def test_a_terminal_shows_one_line_that_is_drawn_over(monkeypatch):
    monkeypatch.setattr(progress_module.shutil, "get_terminal_size", lambda: __import__("os").terminal_size((200, 24)))
    terminal = Terminal()
    with Progress(40, terminal) as progress:
        progress.step({"step": 11, "eval/held_out/greedy": 0.75})
        progress.step(ROW)
        progress.status("generating")
        progress.note("checkpoint written")
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert drawn[-1] == format_step({**ROW, "eval/held_out/greedy": 0.75}, 40) + "\n"
    assert drawn[3].endswith("[generating]")
    assert "checkpoint written\n" in drawn
    assert terminal.getvalue().count("\n") == 2


def test_the_live_line_never_wraps(monkeypatch):
    monkeypatch.setattr(progress_module.shutil, "get_terminal_size", lambda: __import__("os").terminal_size((30, 24)))
    terminal = Terminal()
    Progress(40, terminal).step(ROW)
    line = terminal.getvalue().removeprefix("\r\x1b[K")
    assert len(line) == 29
    assert line.endswith("…")


def test_off_a_terminal_each_step_is_one_log_line(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, "asyppo_megatron"), Progress(40, stream) as progress:
        progress.step(ROW)
        progress.status("generating")
    assert stream.getvalue() == ""
    assert caplog.messages == [format_step(ROW, 40)]


# --- logs ----------------------------------------------------------------------------------------------------------


def test_the_prefix_names_the_role_and_its_ranks():
    assert log_prefix("actor", tp=0, pp=1, dp=2) == "[actor tp0 pp1 dp2]"
    assert log_prefix("driver") == "[driver]"


@pytest.mark.parametrize(
    ("rank", "terminal", "informed"), [(0, False, True), (0, True, False), (3, False, False), (3, True, False)]
)
def test_the_file_gets_everything_and_stderr_what_a_person_should_see(
    tmp_path, clean_logging, rank, terminal, informed
):
    stream = Terminal() if terminal else io.StringIO()
    configure_logging(tmp_path, f"rank_{rank}", prefix="[actor tp0 pp0 dp0]", rank=rank, stream=stream)
    logging.getLogger("asyppo_megatron.roles").info("hello")
    logging.getLogger("asyppo_megatron.roles").warning("careful")
    logging.getLogger("someone.else").info("chatter")
    logging.getLogger("someone.else").warning("theirs")
    warnings.warn("deprecated", stacklevel=1)
    lines = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines[:3]] == [
        "INFO [actor tp0 pp0 dp0] hello",
        "WARNING [actor tp0 pp0 dp0] careful",
        "WARNING [actor tp0 pp0 dp0] theirs",
    ]
    assert any("deprecated" in line for line in lines)
    assert ("hello" in stream.getvalue()) == informed
    assert "careful" in stream.getvalue()
    assert "theirs" not in stream.getvalue()
    assert "deprecated" not in stream.getvalue()
    assert stream.getvalue().startswith("\r\x1b[K") == terminal


def test_configuring_twice_replaces_the_prefix_and_doubles_nothing(tmp_path, clean_logging):
    terminal, basic = io.StringIO(), io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(basic))  # as logging.basicConfig would
    configure_logging(tmp_path, "rank_0", stream=io.StringIO())
    configure_logging(tmp_path, "rank_0", prefix="[critic_0 100%]", stream=terminal)
    logging.getLogger("asyppo_megatron").info("once")
    assert (terminal.getvalue().count("once"), basic.getvalue()) == (1, "")
    (line,) = (tmp_path / "logs" / "rank_0.log").read_text().splitlines()
    assert line.endswith("INFO [critic_0 100%] once")


# --- report --------------------------------------------------------------------------------------------------------


def test_the_learning_curve_is_a_picture_in_the_run_directory(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log({"step": 0, "eval/held_out/greedy": 0.25})
        for step in range(3):
            log.log({"step": step, "reward": step / 3, "explained_variance/critic_0": math.nan, "value_std": 0.1})
    picture = learning_curve(tmp_path)
    assert picture == tmp_path / "learning_curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning_curve.png", "metrics.jsonl"]


def test_the_summary_holds_first_and_last_values_and_the_seconds_of_a_mean_step(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log({"step": 0, "eval/held_out/greedy": 0.25})
        log.log({"step": 0, "reward": 0.25, "seconds/step": 2.0, "seconds/actor": 1.0})
        log.log({"step": 1, "reward": 0.75, "seconds/step": 4.0, "seconds/actor": 2.0, "seconds/checkpoint": 1.0})
        log.log({"step": 2, "eval/held_out/greedy": 0.9})
    head, *lines = summary(tmp_path).splitlines()
    assert head == f"{tmp_path}: 2 steps in 6.0 s"
    assert [line.split() for line in lines] == [
        ["reward", "0.25", "->", "0.75"],
        ["eval/held_out/greedy", "0.25", "->", "0.9"],
        ["seconds", "a", "step:", "step", "3.00,", "actor", "1.50,", "checkpoint", "0.50"],
    ]
    picture = learning_curve(tmp_path)
    assert summary(tmp_path).endswith(f"learning curve: {picture}")


def test_a_run_without_metrics_has_no_curve(tmp_path):
    with pytest.raises(ValueError, match="got no metrics, need at least one step"):
        learning_curve(tmp_path)
    (Path(tmp_path) / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="got no metrics"):
        learning_curve(tmp_path)


# --- timing --------------------------------------------------------------------------------------------------------


def test_phases_add_up_and_start_again_after_a_read():
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.phase("actor", tokens=64):
            time.sleep(0.02)
    with pytest.raises(RuntimeError), timer.phase("critics"):
        raise RuntimeError
    timer.add("generate", 1.5)
    timer.count("generate", 10)
    row = timer.read()
    assert list(row) == ["seconds/actor", "seconds/critics", "seconds/generate", "tokens/actor", "tokens/generate"]
    assert 0.04 <= row["seconds/actor"] < 0.5
    assert (row["seconds/generate"], row["tokens/actor"], row["tokens/generate"]) == (1.5, 128, 10)
    assert timer.read() == {}


def test_nested_phases_each_count_in_full():
    timer = PhaseTimer(torch.device("cpu"))
    with timer.phase("step"), timer.phase("actor"):
        time.sleep(0.02)
    seconds = seconds_by_phase(timer.read())
    assert seconds["step"] >= seconds["actor"] >= 0.02


@pytest.mark.gpu
def test_on_a_gpu_phases_hold_the_devices_time_and_entering_them_does_not_wait():
    device = torch.device("cuda")
    timer = PhaseTimer(device)
    x = torch.randn(8192, 8192, device=device)
    (x @ x).sum().item()
    began = time.perf_counter()
    with timer.phase("step"):
        with timer.phase("actor"):
            for _ in range(20):
                x @ x
        with timer.phase("idle"):
            pass
    enqueued = time.perf_counter() - began
    row = timer.read()
    waited = time.perf_counter() - began
    assert row["seconds/idle"] < 1e-3 < row["seconds/actor"] <= row["seconds/step"]
    assert enqueued < 0.5 * row["seconds/actor"]
    assert row["seconds/step"] <= waited * 1.05
    assert timer.read() == {}
