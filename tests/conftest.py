"""What every test relies on: no network, one thread, fixed seeds."""

import os

# Read when transformers is imported, so it is set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# With several processes on few cores, two threads each are many times slower than one.
torch.set_num_threads(1)

# The same examples in every run: a failure is a failure for everyone. With
# `--hypothesis-profile thorough` there are more of them.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=6)
settings.register_profile("thorough", settings.get_profile("fixed"), max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
