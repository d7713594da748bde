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


class Below(nn.Module):
    """A proposal that reaches where the prior has no density."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.distributions.Distribution:
        import pyro.distributions as dist

        loc = torch.full((*x.shape[:-1], Z), 5.0).to(x)
        return dist.Normal(loc, self.scale).to_event(1)


@pytest.mark.parametrize("scale", [10.0, 0.01])  # draws below 0, or none though some could be
@pytest.mark.parametrize("method", ["elbo", "iwae", "ais"])
def test_proposals_that_leave_the_support_of_the_prior_are_refused(
    method: str, scale: float
) -> None:
    pair, x = sparse("exponential", "point"), torch.randn(4, D)
    with pytest.raises(ValueError, match=r"proposal makes codes outside the support"):
        probae.log_likelihood(pair, x, method, 10, proposal=Below(scale))
    with pytest.raises(ValueError, match=r"proposal makes codes outside the support"):
        probae.denoise(pair, x, probae.GaussianNoise(0.5), proposal=Below(scale))


def test_proposals_with_atoms_are_refused_under_a_prior_without() -> None:
    pair, x = sparse("laplace", "point"), torch.randn(4, D)
    atoms = probae.SpikeAndSlabEncoder(probae.MLP(D, (3, Z)))
    with pytest.raises(ValueError, match="proposal puts probability on codes of exactly 0"):
        probae.log_likelihood(pair, x, "iwae", 10, proposal=atoms)


@pytest.mark.parametrize(
    "proposal", [nn.Linear(D, Z), nn.Linear(D + 1, Z), probae.GaussianEncoder(probae.MLP(9, 2))]
)
def test_what_is_no_proposal_is_named(proposal: nn.Module) -> None:
    pair, x = linear_point_pair(), torch.randn(4, D)
    with pytest.raises(ValueError, match="proposal"):
        probae.log_likelihood(pair, x, "iwae", 10, proposal=proposal)
    with pytest.raises(ValueError, match="proposal"):
        probae.denoise(pair, x, probae.GaussianNoise(0.5), proposal=proposal)


def test_fitting_is_reproducible_and_leaves_the_random_stream_alone() -> None:
    pair, x = linear_point_pair(), torch.randn(50, D)
    stream = torch.get_rng_state()
    first, second = (probae.fit_proposal(pair, x, epochs=1, progress=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), stream)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_inference_mode_is_refused_where_gradients_are_needed() -> None:
    pair, x = linear_point_pair(), torch.randn(50, D)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="fit needs gradients"):
            probae.fit(pair, x, epochs=1, progress=False)
        with pytest.raises(ValueError, match="method='ais' needs gradients"):
            probae.log_likelihood(pair, x, "ais", 2)


def test_asking_for_the_prior_leaves_no_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(D), nn.Linear(D, 2 * Z)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(nn.functional.dropout(x, 0.3, self.training))).unflatten(
                -1, (2, Z)
            )

    encoder = probae.GaussianEncoder(Noisy())
    pair = Autoencoder(
        probae.VampPrior(encoder, D, 5), encoder, probae.GaussianDecoder(probae.MLP(Z, D))
    )
    x, stream = torch.randn(20, D), torch.get_rng_state()
    before = copy.deepcopy(pair.state_dict())
    probae.sample(pair, 3, seed=0)
    probae.log_likelihood(pair, x, "iwae", 5)
    probae.log_likelihood(pair, x, "ais", 2, annealing=probae.Annealing(3))
    probae.denoise(pair, x, probae.GaussianNoise(0.5), num_samples=3)
    probae.fit_proposal(pair, x, epochs=1, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
