"""Log files: plain lines, one file a process, with a prefix that says who speaks."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

PACKAGE_LOGGER = "asyppo_megatron"
LINE = "%(asctime)s %(levelname)s {prefix}%(message)s"
_OURS = "asyppo_handler"  # attribute that marks the handlers this module made


def log_prefix(role: str, *, tp: int | None = None, pp: int | None = None, dp: int | None = None) -> str:
    """`[actor tp0 pp1 dp0]`; a process without a place in a layout has its name alone, `[driver]`."""
    axes = [f"{axis}{rank}" for axis, rank in (("tp", tp), ("pp", pp), ("dp", dp)) if rank is not None]
    return "[" + " ".join([role, *axes]) + "]"


class _LineClearingHandler(logging.StreamHandler[TextIO]):
    """Writes to a terminal that may show a progress line: the line is wiped first, its next update draws it again."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
        super().emit(record)


def _is_for_a_person(record: logging.LogRecord) -> bool:
    """Ours, and others' errors; Megatron alone has a dozen warnings at every start."""
    return record.name.split(".")[0] == PACKAGE_LOGGER or record.levelno >= logging.ERROR


def configure_logging(
    run_dir: Path | None,
    process: str,
    *,
    prefix: str = "",
    rank: int = 0,
    level: int | str = logging.INFO,
    stream: TextIO | None = None,
    has_progress: bool = True,
) -> None:
    """Send this process's log to `run_dir/logs/<process>.log`, and what a person should see to stderr.

    stderr gets this package's warnings; of rank 0 also INFO when it is not a terminal (there the progress line says
    it). Other packages are heard from WARNING on, in the file; on stderr from ERROR on. Call it again once the role
    is known: it replaces what it set before.

    Args:
        run_dir: None for no file.
        process: name of the file, for instance `rank_0`, `driver`.
        prefix: from `log_prefix`.
        rank: rank in the training world; 0 for a process that speaks for itself.
        level: lowest level of this package's messages.
        stream: instead of stderr.
        has_progress: a progress line tells what INFO would; without one INFO goes to a terminal too.
    """
    stream = sys.stderr if stream is None else stream
    root = logging.getLogger()
    # Ours from an earlier call, and what logging.basicConfig made: it would say every line a second time.
    for handler in [h for h in root.handlers if hasattr(h, _OURS) or type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(LINE.format(prefix=prefix.replace("%", "%%") + " " if prefix else ""))

    terminal = _LineClearingHandler(stream)
    terminal.setLevel(logging.INFO if rank == 0 and not (has_progress and stream.isatty()) else logging.WARNING)
    if run_dir is not None:
        terminal.addFilter(_is_for_a_person)
    handlers: list[logging.Handler] = [terminal]
    if run_dir is not None:
        path = run_dir / "logs" / f"{process}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path))
    for handler in handlers:
        handler.setFormatter(formatter)
        setattr(handler, _OURS, True)
        root.addHandler(handler)
    torch_logger = logging.getLogger("torch")  # has a handler of its own for stderr once torch is imported
    torch_logger.handlers.clear()
    torch_logger.propagate = True
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE_LOGGER).setLevel(level)
    logging.captureWarnings(True)
