"""Codes in scikit-learn pipelines classify digits: the whole search is slow, a part is not."""

import pytest

from . import digits_pipeline


@pytest.mark.slow
def test_codes_classify_digits_no_worse_than_raw_pixels() -> None:
    result = digits_pipeline.run()
    print(digits_pipeline.table(result))
    for name in ("DAE", "SAE"):
        row = result["rows"][name]
        assert row["accuracy"] >= 0.93
        assert row["gain"] > -2 * row["gain_std_error"]


def test_a_pipeline_on_codes_reaches_93_percent_on_test_images() -> None:
    names = ("raw pixels", "DAE", "SAE")
    result = digits_pipeline.run(names, epochs=5, strengths=(0.1,), first_only=True)
    for name in ("DAE", "SAE"):
        assert result["rows"][name]["accuracy"] >= 0.93  # by chance 0.1
    assert "| DAE |" in digits_pipeline.table(result)
