"""The score of a trained denoising autoencoder, as a test of about half a minute."""

import pytest
import torch

from . import denoising_score


def test_exact_score_is_the_gradient_of_the_log_density() -> None:
    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    variance = denoising_score.WIDTHS**2 + 0.2**2
    square = ((x[:, None] - denoising_score.MEANS) ** 2).sum(-1)
    log_normal = -square / (2 * variance) - torch.log(2 * torch.pi * variance)
    log_density = torch.logsumexp(denoising_score.WEIGHTS.log() + log_normal, 1)
    (expected,) = torch.autograd.grad(log_density.sum(), x)
    actual = denoising_score.exact_score(x.detach(), 0.2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_trained_denoiser_has_the_smoothed_score(capsys: pytest.CaptureFixture[str]) -> None:
    result = denoising_score.run()
    with capsys.disabled():
        print(f"\n{denoising_score.line(result)}")
    assert result["error"] <= 0.1
    assert result["error_against_clean"] > 3 * result["error"]
