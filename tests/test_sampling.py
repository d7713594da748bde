"""Sampling from the model and reconstruction."""

import pytest
import torch

import probae


def test_samples_follow_the_model() -> None:
    torch.manual_seed(0)
    pair = probae.PPCA(3, 1).double()
    pair.set_parameters(torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([1.0, 0.0, -1.0]), 0.5)
    x, z = probae.sample(pair, 100_000, seed=0)
    assert x.shape == (100_000, 3)
    assert z.shape == (100_000, 1)
    expected = torch.tensor([[1.25, 2.0, 0.0], [2.0, 4.25, 0.0], [0.0, 0.0, 0.25]]).double()
    std_error = 4.25 * (2 / 100_000) ** 0.5
    assert torch.allclose(torch.cov(x.T), expected, atol=5 * std_error)
    assert torch.allclose(x.mean(0), torch.tensor([1.0, 0.0, -1.0]).double(), atol=0.05)


def test_seed_fixes_the_draw_and_none_advances_the_global_stream() -> None:
    pair = probae.VAE(8, 2)
    assert torch.equal(probae.sample(pair, 4, seed=1).x, probae.sample(pair, 4, seed=1).x)
    torch.manual_seed(0)
    first, second = probae.sample(pair, 4), probae.sample(pair, 4)
    assert not torch.equal(first.z, second.z)
    torch.manual_seed(0)
    assert torch.equal(probae.sample(pair, 4).z, first.z)


@pytest.mark.parametrize("prior", ["normal", "laplace", "mixture", "vamp", "flow"])
def test_every_proper_prior_can_be_sampled(prior: str) -> None:
    x, z = probae.sample(probae.VAE((1, 4, 4), 3, prior=prior), 5)
    assert x.shape == (5, 1, 4, 4)
    assert z.shape == (5, 3)
    assert not x.requires_grad


def test_reconstruction_is_the_decoder_at_the_mean_code() -> None:
    pair, x = probae.VAE(8, 2), torch.rand(5, 8)
    reconstruction = probae.reconstruct(pair, x)
    expected = pair.decoder(pair.encoder(x).mean).mean
    assert torch.equal(reconstruction.mean, expected)
    assert reconstruction.log_prob(x.round()).shape == (5,)


def test_nothing_is_drawn_from_a_flat_prior() -> None:
    with pytest.raises(ValueError, match="flat prior"):
        probae.sample(probae.UndercompleteAutoencoder(8, 2), 4)
