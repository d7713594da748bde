"""Proposals fitted to frozen decoders: bounds that are right, pairs that stay as they were."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import probae
from probae import Autoencoder

D, Z = 6, 3


def linear_point_pair() -> Autoencoder:
    """A MAP autoencoder whose generative part is linear-Gaussian, so that log p(x) is exact."""
    torch.manual_seed(0)
    return probae.UndercompleteAutoencoder(
        D, Z, hidden=(), prior="normal", likelihood_options={"scale": 0.5}
    )


def test_fitted_proposal_measures_what_the_point_code_cannot() -> None:
    pair = linear_point_pair()
    x, test = probae.sample(pair, 2000, seed=1).x, probae.sample(pair, 200, seed=2).x
    exact = probae.log_likelihood(pair, test, "exact")
    with pytest.raises(ValueError, match=r"MAP_JOINT.*fit_proposal"):
        probae.log_likelihood(pair, test, "iwae")
    proposal = probae.fit_proposal(
        pair, x, hidden=(32,), epochs=30, lr=5e-3, schedule="cosine", progress=False
    )
    bound = probae.log_likelihood(pair, test, "iwae", 2000, proposal=proposal)
    assert bound.is_bound
    assert bound.khat.median() < 0.7
    # paired difference of the means, within three of its standard errors and never above by more
    difference = bound.values - exact.values
    assert abs(float(difference.mean())) < 3 * float(bound.std_error.square().mean().sqrt())
    elbo = probae.log_likelihood(pair, test, "elbo", 200, proposal=proposal)
    assert elbo.mean < exact.mean
    untrained = probae.GaussianEncoder(probae.MLP(D, (2, Z)))
    loose = probae.log_likelihood(pair, test, "elbo", 200, proposal=untrained)
    assert loose.mean < elbo.mean - 1


def test_the_pair_stays_as_it_was() -> None:
    pair, x = linear_point_pair(), torch.randn(50, D)
    pair.decoder.network.output.bias.requires_grad_(False)
    pair.encoder.eval()
    state = copy.deepcopy(pair.state_dict())
    flags = {name: p.requires_grad for name, p in pair.named_parameters()}
    modes = {name: m.training for name, m in pair.named_modules()}
    probae.fit_proposal(pair, x, epochs=2, progress=False)
    with pytest.raises(ValueError, match="epochs"):
        probae.fit_proposal(pair, x, epochs=0, progress=False)
    assert all(torch.equal(state[name], tensor) for name, tensor in pair.state_dict().items())
    assert {name: p.requires_grad for name, p in pair.named_parameters()} == flags
    assert {name: m.training for name, m in pair.named_modules()} == modes


def sparse(prior: str, posterior: str, **options: object) -> Autoencoder:
    return probae.SparseAutoencoder(D, Z, prior=prior, posterior=posterior, **options)


@pytest.mark.parametrize(
    ("build", "encoder"),
    [
        (lambda: sparse("laplace", "point"), probae.GaussianEncoder),
        (lambda: sparse("laplace", "sparse-coding"), probae.GaussianEncoder),
        (lambda: sparse("exponential", "point"), probae.LogNormalEncoder),
        (lambda: sparse("spike-and-slab", "point"), probae.SpikeAndSlabEncoder),
        (lambda: sparse("subset", "point", num_active=2), probae.ConditionalBernoulliEncoder),
        (
            lambda: probae.PredictiveSparseDecomposition(D, Z, hidden=(5,)),
            probae.GaussianEncoder,
        ),
        (
            lambda: probae.SemanticHashing(D, Z, posterior="threshold", likelihood="gaussian"),
            probae.BernoulliEncoder,
        ),
    ],
)
def test_default_encoder_has_the_density_that_the_prior_needs(
    build: Callable[[], Autoencoder], encoder: type[nn.Module]
) -> None:
    pair, x = build().double(), torch.randn(20, D, dtype=torch.float64)
    proposal = probae.fit_proposal(pair, x, hidden=(5,), epochs=1, progress=False)
    assert type(proposal) is encoder
    assert next(proposal.parameters()).dtype == torch.float64
    ll = probae.log_likelihood(pair, x, "iwae", 20, proposal=proposal)
    assert ll.is_bound
    assert ll.values.isfinite().all()


def test_corruption_and_factor_take_no_part() -> None:
    plain = probae.VAE(D, Z, likelihood="gaussian")
    torch.manual_seed(0)
    proposal = probae.GaussianEncoder(probae.MLP(D, (2, Z)))
    x = torch.randn(10, D)
    pairs = [
        plain,
        Autoencoder(plain.prior, plain.encoder, plain.decoder, probae.GaussianNoise(0.3)),
        Autoencoder(
            plain.prior,
            plain.encoder,
            plain.decoder,
            factor=probae.CodeCoupling(plain.encoder, 0.1),
        ),
    ]
    values = [probae.log_likelihood(p, x, "iwae", 50, proposal=proposal).values for p in pairs]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_own_encoder_and_objective_are_used() -> None:
    pair, x = linear_point_pair(), torch.randn(50, D)
    own = probae.GaussianEncoder(probae.MLP(D, (2, Z)))
    before = copy.deepcopy(own.state_dict())
    got = probae.fit_proposal(
        pair, x, encoder=own, objective=probae.IWAE(3), epochs=1, progress=False
    )
    assert got is own
    assert not torch.equal(own.network.output.weight, before["network.layers.0.weight"])


def test_what_cannot_be_measured_is_refused() -> None:
    x = torch.randn(20, D)
    with pytest.raises(ValueError, match=r"RECONSTRUCTION: its prior is flat"):
        probae.fit_proposal(probae.UndercompleteAutoencoder(D, Z), x)
    with pytest.raises(ValueError, match="its prior is flat or improper"):
        probae.fit_proposal(sparse("spike-and-slab", "point", slab_scale=None), x)
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder"):
        probae.fit_proposal(nn.Linear(3, 3), x)
    with pytest.raises(ValueError, match="encoder"):
        probae.fit_proposal(
            linear_point_pair(), x, encoder=probae.GaussianEncoder(probae.MLP(D, (2, Z + 1)))
        )
