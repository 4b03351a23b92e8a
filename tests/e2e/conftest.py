"""Fixtures of the end-to-end tests: tiny models and data, and one run that many tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_runs import Asyppo, Command, init_model
from transformers.utils.logging import disable_progress_bar

from asyppo_megatron.demo import prepare


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, problems, and the models `actor` and `critic`."""
    directory = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("NUM_SUPERVISED", 8), ("NUM_TRAIN", 64), ("NUM_HELD_OUT", 12)):
            patch.setattr(prepare, name, count)
        prepare.prepare_demo(directory)
    disable_progress_bar()
    init_model(directory / "actor", hidden=32, seed=0)
    init_model(directory / "critic", hidden=16, seed=1)
    return directory


@pytest.fixture(scope="session")
def asyppo(data: Path) -> Iterator[Asyppo]:
    commands = Asyppo(data)
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def finished(asyppo: Asyppo, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The run of `tree`, from start to end without interruption. Its directory is not to be changed."""
    return asyppo.train(tmp_path_factory.mktemp("finished") / "run")
