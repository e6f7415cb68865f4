"""Hydra's own tests of a launcher, which ask as much of a sweeper. A task that is not loralab's runs job by job."""

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

from hydra_plugins.loralab_packed.packed_launcher import PackedLauncher
from hydra_plugins.loralab_sweeper.loralab_sweeper import LoralabSweeper


@pytest.fixture(autouse=True)
def defaults_of_its_own():
    """The suite counts on Hydra's defaults before 1.2; an application that ran before in this process leaves others."""
    before = VersionBase.instance().getbase()
    VersionBase.instance().setbase(Version("1.1"))
    yield
    VersionBase.instance().version_base = before


BATCHED = ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2"]


def test_hydra_finds_the_launcher():
    assert PackedLauncher.__name__ in [found.__name__ for found in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(("launcher_name", "overrides"), [("packed", ["hydra/sweeper=basic"])])
class TestPacked(LauncherTestSuite):
    """Sweeps of one and two jobs, groups, strictness, resolvers."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("packed", ["hydra/sweeper=loralab"]), ("basic", ["hydra/sweeper=loralab"])]
)
class TestSweeper(LauncherTestSuite):
    """loralab's sweeper under its own launcher and under Hydra's."""


def test_hydra_finds_the_sweeper():
    assert LoralabSweeper.__name__ in [found.__name__ for found in Plugins.instance().discover(Sweeper)]


@pytest.mark.parametrize(("launcher_name", "overrides"), [("packed", BATCHED)])
class TestPackedInBatches(BatchedSweeperTestSuite):
    """A sweeper that hands the jobs over in batches."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=packed", "hydra.job.chdir=True"])]
)
class TestPackedAsAProgram(IntegrationTestSuite):
    """Names, folders and environment of applications in processes of their own."""
