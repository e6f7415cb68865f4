import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data():
    """The folder of real data sets, where this machine has it."""
    folder = os.environ.get("LORALAB_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LORALAB_TEST_DATA names no folder with real data sets")
    return Path(folder)
