"""For all tests: one thread a process, since they share few cores with the servers that they start."""

import os

import torch
from hypothesis import settings

# the processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# CI tries the same examples every time; elsewhere each run tries new ones
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
