"""Fixtures of the end-to-end tests: tiny models and data, and one run that many tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_runs import Asyppo, Command, make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, problems, and the models `actor` and `critic`."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def asyppo(data: Path) -> Iterator[Asyppo]:
    commands = Asyppo(data)
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def finished(asyppo: Asyppo, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The run of `tree`, from start to end without interruption. Its directory is not to be changed."""
    return asyppo.train(tmp_path_factory.mktemp("finished") / "run")
