"""The measurement of steps on a GPU runs, and takes the same steps all three ways."""

import pytest
import torch

from . import gpu_steps


def test_the_measurement_runs_end_to_end_in_small() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = gpu_steps.run(batch_size=16, rounds=1, steps=2, device=device)
    losses = [turns[0]["loss"] for turns in result["turns"].values()]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert all(ms > 0 for ms in result["medians"].values())
    assert "| batch 16 |" in gpu_steps.table([result])
