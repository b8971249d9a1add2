"""Settings of all tests."""

import os
import sys

import pytest
import torch
from hypothesis import settings
from processes import Processes

# Small tensors: further threads would only wait for one another.
torch.set_num_threads(1)

# No test fails for being slow; in continuous integration the examples are the same every time.
settings.register_profile("conjopt", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("conjopt")


@pytest.fixture(autouse=True)
def nothing_written_down():
    """Rules run anew in each test, which may have changed what they go by."""
    yield
    if (program := sys.modules.get("conjopt.measure.layers.program")) is not None:
        program._KNOWN.clear()


# A command of its own, whose requirements not everyone has.
collect_ignore = ["mutation"]

# Processes of a group, which stay up for all modules, as it takes them seconds to start.


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    processes = Processes(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    processes = Processes(3, tmp_path_factory.mktemp("three"))
    yield processes
    processes.stop()
