"""Notebooks that run side by side take one thread each: as many processes as cores are faster."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the kernels
