"""Where the experiments find MNIST."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    if "PROBAE_DATA" not in os.environ:
        shared = Path(__file__).parents[3] / "shared" / "data"
        if not (shared / "mnist").is_dir():
            pytest.skip("set PROBAE_DATA to a folder that holds mnist/*.gz")
        monkeypatch.setenv("PROBAE_DATA", str(shared))
