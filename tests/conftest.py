"""Settings of all tests."""

import os

import torch
from hypothesis import settings

# Small tensors: further threads would only wait for one another.
torch.set_num_threads(1)

# No test fails for being slow; in continuous integration the examples are the same every time.
settings.register_profile("conjopt", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("conjopt")
