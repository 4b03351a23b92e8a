"""Fixtures of the cluster tests; they are skipped where no Slurm can be started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_runs import Asyppo, Command, make_data
from slurm_jobs import Slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    if any(shutil.which(name) is None for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        reason = "Slurm not installed (slurmctld, slurmd, munge, slurm-client)"
    elif os.geteuid():
        reason = "starting a Slurm needs root"
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("cluster-data"))


@pytest.fixture(scope="session")
def local(cluster_data: Path) -> Iterator[Asyppo]:
    """Commands without Slurm."""
    commands = Asyppo(cluster_data)
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def reference(local: Asyppo, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The run that every job must equal, from `asyppo train`."""
    return local.train(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="session")
def slurm(cluster_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), cluster_data)
    yield cluster
    cluster.close()
