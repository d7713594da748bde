"""Walks through the code space: which codes they hold, and what they refuse."""

import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import probae
from probae import interpolate, traverse

DOUBLE = torch.float64


def vae(z_dim: int = 3, **options: Any) -> probae.VAE:
    return probae.VAE(8, z_dim, hidden=(5,), **options)


def with_prior(prior: probae.Part, encoder: Any, parameters: tuple[int, ...]) -> probae.Autoencoder:
    network = probae.MLP(8, (*parameters, 3))
    return probae.Autoencoder(prior, encoder(network), probae.BernoulliDecoder(probae.MLP(3, 8)))


def bits() -> probae.Autoencoder:
    return with_prior(probae.BernoulliPrior(3), probae.BernoulliEncoder, ())


# ---- one coordinate at a time --------------------------------------------------------------------


def test_a_traversal_changes_one_coordinate_and_leaves_the_others() -> None:
    pair = vae()
    start, values = torch.tensor([0.1, -0.2, 0.3]), [-1.0, 0.5]
    walk = traverse(pair, start, values=values)
    assert walk.z.shape == (3, 2, 3)
    for d in range(3):
        for s in range(2):
            expected = start.clone()
            expected[d] = values[s]
            assert torch.equal(walk.z[d, s], expected)
    assert walk.values.tolist() == [values] * 3
    assert walk.x.batch_shape == (3, 2)
    assert torch.equal(walk.x.mean, pair.decoder(walk.z).mean)
    assert not walk.x.mean.requires_grad


def test_dimensions_are_those_asked_for_with_values_of_their_own() -> None:
    start = torch.zeros(3)
    walk = traverse(vae(), start, [2, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert walk.z.tolist() == [[[0, 0, 1], [0, 0, 2]], [[3, 0, 0], [4, 0, 0]]]
    assert walk.values.tolist() == [[1, 2], [3, 4]]
    assert torch.equal(
        traverse(vae(), start, torch.tensor([1]), [0.5]).z[0, 0], start + torch.tensor([0, 0.5, 0])
    )
    assert traverse(vae(), start, range(2), [0.5]).z.shape == (2, 1, 3)


def test_values_are_quantiles_of_the_prior() -> None:
    q = torch.linspace(0.025, 0.975, 5, dtype=DOUBLE)
    normal = torch.distributions.Normal(torch.zeros((), dtype=DOUBLE), 1.0).icdf(q)
    walk = traverse(vae().double(), num_steps=5)
    assert torch.allclose(walk.values, normal.expand(3, 5), atol=1e-12)
    assert torch.equal(walk.z[1, :, 0], torch.zeros(5, dtype=DOUBLE)), "around the prior's mean"
    laplace = with_prior(probae.LaplacePrior(3, rate=2.0), probae.LaplaceEncoder, (2,))
    signed = torch.tensor([math.log(0.05), math.log(0.5 * 1.05), 0, 0, 0]) / 2
    signed = torch.cat([signed[:3], -signed[:2].flip(0)])  # ½ e^{2v} = q below the median
    assert torch.allclose(traverse(laplace, num_steps=5).values, signed.expand(3, 5), atol=1e-5)
    exponential = with_prior(probae.ExponentialPrior(3, 2.0), probae.LogNormalEncoder, (2,))
    walk = traverse(exponential, num_steps=5)
    assert torch.allclose(walk.values.double(), (-torch.log1p(-q) / 2).expand(3, 5), atol=1e-5)
    assert torch.allclose(walk.z[0, :, 1], torch.full((5,), 0.5)), "around the prior's mean"


def test_quantiles_without_a_closed_form_are_those_of_draws() -> None:
    # of 10 000 draws: standard error of a quantile √(q (1 - q) / 10 000) / p(v), below 0.12 here;
    # five of them fail one time in a million
    prior = probae.GaussianMixturePrior(3, components=2)
    prior.loc.data = torch.tensor([[-2.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    walk = traverse(with_prior(prior, probae.GaussianEncoder, (2,)), num_steps=3)
    below = torch.distributions.Normal(0.0, 1.0).cdf
    for d in range(3):
        mass = sum(below(walk.values[d] - prior.loc[c, d].detach()) for c in range(2)) / 2
        assert torch.allclose(mass, torch.tensor([0.025, 0.5, 0.975]), atol=5 * 0.005)
    some = traverse(with_prior(prior, probae.GaussianEncoder, (2,)), None, [2, 0], num_steps=3)
    assert torch.equal(some.values, walk.values[[2, 0]])
    torch.manual_seed(1)
    one = traverse(vae(prior="flow")).values
    torch.manual_seed(1)
    assert torch.equal(one, traverse(vae(prior="flow")).values)


def test_one_step_is_the_median() -> None:
    assert traverse(vae(), num_steps=1).values.tolist() == [[0.0]] * 3


def test_bits_take_both_values() -> None:
    walk = traverse(bits(), torch.tensor([1.0, 0.0, 1.0]))
    assert walk.values.tolist() == [[0.0, 1.0]] * 3
    assert walk.z[0].tolist() == [[0, 0, 1], [1, 0, 1]]


def test_a_datum_starts_at_its_mean_code() -> None:
    pair, x = vae(), torch.rand(4, 8).round()
    code = pair.encoder(x[:1]).mean[0]
    for start in (x[0], x[:1], x[0].numpy()):
        walk = traverse(pair, start, [1], [7.0], space="x")
        assert torch.allclose(walk.z[0, 0], torch.stack([code[0], torch.tensor(7.0), code[2]]))
    known = probae.DenoisingVAE(
        8, 3, corruption=probae.Masking(0.3, known=True), likelihood="bernoulli"
    )
    assert traverse(known, x[0], space="x").z.shape == (3, 7, 3)


def test_a_flat_prior_takes_values_and_a_datum() -> None:
    pair = probae.UndercompleteAutoencoder(8, 3, hidden=(5,))
    assert traverse(pair, torch.rand(8), values=[0.0, 1.0], space="x").z.shape == (3, 2, 3)
    with pytest.raises(ValueError, match="values must be given where the prior is flat"):
        traverse(pair, torch.zeros(3))
    with pytest.raises(ValueError, match="start must be given for a pair of kind RECONSTRUCTION"):
        traverse(pair, values=[0.0])


# ---- from one code to another --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (5, 3)])
@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_a_way_begins_and_ends_where_it_should(shape: tuple[int, ...], kind: str) -> None:
    pair = vae().double()
    start, end = torch.randn(2, *shape, dtype=DOUBLE)
    walk = interpolate(pair, start, end, 6, kind=kind)
    assert walk.z.shape == (6, *shape)
    assert torch.allclose(walk.z[0], start, atol=1e-14)
    assert torch.allclose(walk.z[-1], end, atol=1e-14)
    assert torch.allclose(walk.values, torch.arange(6, dtype=DOUBLE) / 5)
    assert walk.x.batch_shape == (6, *shape[:-1])
    assert torch.equal(walk.x.mean, pair.decoder(walk.z).mean)
    back = interpolate(pair, end, start, 6, kind=kind)
    assert torch.allclose(back.z, walk.z.flip(0), atol=1e-13)


def test_a_linear_way_is_a_straight_line_in_equal_steps() -> None:
    start, end = torch.randn(2, 3, dtype=DOUBLE)
    steps = interpolate(vae().double(), start, end, 9).z.diff(dim=0)
    assert torch.allclose(steps, ((end - start) / 8).expand(8, 3), atol=1e-14)


def test_a_spherical_way_is_the_great_circle_in_equal_angles() -> None:
    start, end = torch.randn(2, 50, 3, dtype=DOUBLE)
    end = end / end.norm(dim=-1, keepdim=True) * start.norm(dim=-1, keepdim=True)
    z = interpolate(vae().double(), start, end, 7, kind="spherical").z
    # White's formula, where the norms are equal
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1)
    omega = cosine.arccos()[:, None]
    for t, codes in zip(torch.linspace(0, 1, 7, dtype=DOUBLE), z, strict=True):
        expected = (((1 - t) * omega).sin() * start + (t * omega).sin() * end) / omega.sin()
        assert torch.allclose(codes, expected, atol=1e-10)
    assert torch.allclose(z.norm(dim=-1), start.norm(dim=-1).expand(7, 50), rtol=1e-12)


def test_the_norm_of_a_spherical_way_goes_from_one_to_the_other_in_equal_steps() -> None:
    start, end = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    z = interpolate(vae(), start, end, 4, kind="spherical").z
    assert torch.allclose(z.norm(dim=-1), torch.tensor([2.0, 3.0, 4.0, 5.0]))
    middle = interpolate(vae(), start, end, 3, kind="linear").z[1]
    assert middle.norm() < 3, "a straight line is nearer to the origin"


def test_codes_of_one_direction_have_a_straight_spherical_way() -> None:
    start = torch.tensor([1.0, 2.0, 2.0])
    for end in (start, 2 * start, start + 1e-6):
        z = interpolate(vae(), start, end, 5, kind="spherical").z
        assert torch.allclose(z, interpolate(vae(), start, end, 5).z, atol=1e-5)


def test_a_spherical_way_is_one_in_units_of_the_prior() -> None:
    class Shifted(probae.Part):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("loc", torch.tensor([1.0, 2.0, 3.0]))
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))

        def forward(self) -> Any:
            return pyro.distributions.Normal(self.loc, self.scale).to_event(1)

    pair = with_prior(Shifted(), probae.GaussianEncoder, (2,))
    loc, scale = pair.prior.loc, pair.prior.scale
    u = torch.eye(3)
    z = interpolate(pair, loc + scale * u[0], loc + scale * u[1], 5, kind="spherical").z
    standard = interpolate(vae(), u[0], u[1], 5, kind="spherical").z
    assert torch.allclose((z - loc) / scale, standard, atol=1e-6)


def test_data_are_encoded_by_their_means() -> None:
    pair, x = vae(), torch.rand(2, 4, 8).round()
    walk = interpolate(pair, x[0], x[1], 3, space="x")
    ends = pair.encoder(x).mean
    assert torch.allclose(walk.z, torch.stack([ends[0], ends.mean(0), ends[1]]), atol=1e-6)
    one = interpolate(pair, x[0, 0], x[1, 0], 3, space="x")
    assert torch.allclose(one.z, walk.z[:, 0], atol=1e-6)


def test_two_discrete_codes_are_a_way_of_two_steps_and_no_more() -> None:
    start, end = torch.zeros(3), torch.ones(3)
    assert interpolate(bits(), start, end, 2).z.tolist() == [[0, 0, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"all codes between start and end .* probae\.traverse"):
        interpolate(bits(), start, end, 3)


# ---- what they refuse, and what they leave alone -------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: traverse(3), r"pair must be a probae\.Autoencoder"),
        (lambda p: traverse(p, torch.zeros(4)), r"start must be codes of shape \(3,\) or \(N, 3\)"),
        (lambda p: traverse(p, torch.zeros(8)), r"got \(8,\), that of data; pass space='x'"),
        (lambda p: traverse(p, torch.zeros(3), space="x"), "that of codes; pass space='z'"),
        (lambda p: traverse(p, torch.zeros(2, 3)), "start must be one code, got 2"),
        (lambda p: traverse(p, torch.ones(2, 8), space="x"), "start must be one datum, got 2"),
        (lambda p: traverse(p, torch.full((8,), 2.0), space="x"), "start must lie in the support"),
        (lambda p: traverse(p, torch.full((3,), math.nan)), "start must be finite"),
        (lambda p: traverse(p, torch.zeros(3), space="y"), "space must be 'z' .* or 'x'"),
        (lambda p: traverse(p, space="y"), "space must be 'z' .* or 'x'"),
        (lambda p: interpolate(p, torch.ones(3), torch.ones(3), space=3), "space must be 'z'"),
        (lambda p: traverse(p, num_steps=0), "num_steps must be an int >= 1"),
        *(
            (
                lambda p, d=d: traverse(p, dimensions=d),
                "dimensions must be one or more ints from 0 t",
            )
            for d in ([], [3], [-1], [0.5], [True], 1, "0")
        ),
        *(
            (lambda p, v=v: traverse(p, values=v), "values must ")
            for v in (1.0, [], ["a"], [[1.0]], torch.zeros(3, 0), [math.nan], [[1.0], [2.0, 3.0]])
        ),
        (
            lambda p: interpolate(p, torch.zeros(3), torch.zeros(2, 3)),
            "end must be as many as start",
        ),
        (lambda p: interpolate(p, torch.zeros(3), torch.ones(8)), "end must be codes of shape"),
        (
            lambda p: interpolate(p, torch.zeros(3), torch.ones(3), 1),
            "num_steps must be an int >= 2",
        ),
        (lambda p: interpolate(p, torch.zeros(3), torch.ones(3), kind="cubic"), "kind must be"),
        (
            lambda p: interpolate(p, torch.zeros(3), torch.ones(3), kind="spherical"),
            "start must not be at the mean of the prior",
        ),
        (
            lambda p: interpolate(p, torch.ones(3), torch.zeros(3), kind="spherical"),
            "end must not be at the mean of the prior",
        ),
        (
            lambda p: interpolate(p, torch.ones(3), -torch.ones(3), kind="spherical"),
            "must not lie opposite each other",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(vae())


def test_priors_that_have_no_sphere_are_refused() -> None:
    start, end = torch.zeros(3), torch.ones(3)
    for prior, name in (("laplace", "Laplace"), ("mixture", "Mixture"), ("flat", "a flat one")):
        with pytest.raises(ValueError, match=f"needs a Gaussian prior .* got {name}"):
            interpolate(vae(prior=prior), start, end, kind="spherical")
    with pytest.raises(ValueError, match="needs a Gaussian prior"):
        interpolate(bits(), start, end, kind="spherical")


def test_codes_outside_the_support_are_refused() -> None:
    with pytest.raises(ValueError, match="start must lie in the support of the prior"):
        traverse(bits(), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"start must be given where the mean .*probae\.sample"):
        traverse(bits())
    with pytest.raises(ValueError, match="mean codes of start must lie in the support"):
        traverse(bits(), torch.ones(8), space="x")
    with pytest.raises(ValueError, match="start with values in its place must lie in the support"):
        traverse(bits(), torch.zeros(3), values=[0.5])
    one_hot = with_prior(probae.CategoricalPrior(3), probae.CategoricalEncoder, ())
    with pytest.raises(ValueError, match="one-hot one has no coordinate that can vary alone"):
        traverse(one_hot, torch.eye(3)[0])
    positive = with_prior(probae.ExponentialPrior(3), probae.LogNormalEncoder, (2,))
    with pytest.raises(ValueError, match="must lie in the support"):
        traverse(positive, values=[-1.0, 1.0])


def test_walking_changes_neither_pair_nor_random_stream() -> None:
    pair = vae(prior="mixture")
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    start = torch.ones(3)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    traverse(pair)
    interpolate(pair, start, 2 * start)
    traverse(pair, torch.ones(8), space="x")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in pair.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    assert start.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_walks_are_in_the_dtype_of_the_pair(dtype: torch.dtype) -> None:
    pair = vae().to(dtype)
    walks = (traverse(pair), interpolate(pair, torch.eye(3)[0], torch.eye(3)[1], kind="spherical"))
    for walk in walks:
        assert walk.z.dtype == walk.values.dtype == walk.x.mean.dtype == dtype


def test_codes_of_images_go_through_convolutions() -> None:
    pair = probae.VAE((1, 4, 4), 2, channels=(3,), hidden=(5,))
    assert traverse(pair).x.mean.shape == (2, 7, 1, 4, 4)
    x: Tensor = torch.rand(2, 5, 1, 4, 4).round()
    assert interpolate(pair, x[0], x[1], 3, space="x").x.mean.shape == (3, 5, 1, 4, 4)
