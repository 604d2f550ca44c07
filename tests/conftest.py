"""One thread for each xdist worker: two workers with two threads each on two cores would wait for one another."""

import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # for processes that tests start, too

    import torch

    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
