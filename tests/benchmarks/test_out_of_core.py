"""Training on 20 GB takes less than 2 GiB of the process's own memory."""

from pathlib import Path

import pytest

from . import out_of_core


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_an_epoch_on_twenty_gigabytes(tmp_path: Path) -> None:
    options = ["--gigabytes", "20", "--batch-size", "2048", "--folder", str(tmp_path)]
    result = out_of_core.main(options)
    assert result["steps"] == result["epoch_steps"]
    assert result["rss_anon_grown_mib"] < 2048
