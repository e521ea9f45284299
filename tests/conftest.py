"""For all tests: one thread a process, since they share few cores with the servers that they start."""

import os

import torch

# the processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
