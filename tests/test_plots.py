"""Tests of probae.plots: what the pictures hold, what they refuse, and what they leave alone."""

import io
import sys
import types
import warnings
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from torch import Tensor

import probae
from probae import plots
from probae.plots import (
    calibration_ranks,
    code_histogram,
    coverage,
    dictionary,
    latent_scatter,
    likelihoods,
    loss_curve,
    reconstructions,
    samples,
    score_field,
    tangent_planes,
    traversals,
)

IMAGE_SHAPES = [(1, 6, 5), (6, 5), (3, 6, 5)]


def sheet(ax: Axes) -> np.ndarray:
    """Pixels of the mosaic that axes show."""
    (image,) = ax.images
    return np.asarray(image.get_array())


def rendered(drawn: Any) -> np.ndarray:
    figure: Any = np.ravel(drawn)[0].figure
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("L"))


def title_of(drawn: Any) -> str:
    """The title, on one line."""
    if isinstance(drawn, Axes):
        return drawn.get_title().replace("\n", " ")
    return str(drawn[0].figure.get_suptitle()).replace("\n", " ")


def fitted(**options: Any) -> probae.Run:
    x = torch.rand(64, 8).round()
    return probae.fit(probae.VAE(8, 2, hidden=(8,)), x, progress=False, **options)


def lines(panels: np.ndarray) -> dict[str, list[float]]:
    return {
        str(line.get_label()): np.asarray(line.get_ydata()).tolist()
        for axes in panels
        for line in axes.get_lines()
    }


def test_loss_curve_shows_the_history_in_nats() -> None:
    run = fitted(epochs=4, val=torch.rand(32, 8).round())
    panels = loss_curve(run, title="VAE on bits")
    drawn = lines(panels)
    assert drawn["training"] == run.history["loss"]
    assert drawn["validation"] == run.history["val_loss"]
    assert drawn["rate, KL(q(z|x) ‖ p(z))"] == run.history["kl"]
    distortion = drawn["distortion, $-E_q$ log p(x|z)"]
    assert [-value for value in distortion] == run.history["reconstruction"]
    assert f"parameters kept: epoch {run.best_epoch}" in drawn
    losses, terms, units = panels
    assert "nats per datum" in losses.get_ylabel()
    assert "nats per datum" in terms.get_ylabel()
    assert np.asarray(units.get_lines()[0].get_ydata()).tolist() == run.history["active_units"]
    assert {axes.get_xlabel() for axes in panels} == {"epoch"}
    assert title_of(panels) == "VAE on bits"
    assert losses.get_title() == "loss: the negative ELBO"


def test_loss_curve_of_a_history_alone_marks_no_epoch() -> None:
    run = fitted(epochs=2)
    panels = loss_curve(run.history)
    assert not any("parameters kept" in label for label in lines(panels))
    assert "validation" not in lines(panels)
    assert "training data" in panels[1].get_title()


def test_loss_curve_says_what_the_loss_is() -> None:
    warmup: Any = probae.LinearWarmup(2, end=0.5)
    warm = fitted(epochs=2, objective=probae.ELBO(warmup))
    panels = loss_curve(warm)
    assert panels[0].get_title() == "loss: the negative ELBO, KL weight 0.5"
    assert "training, KL weight 0.25 to 0.5" in lines(panels)
    point = probae.UndercompleteAutoencoder(8, 2, hidden=(8,))
    panels = loss_curve(probae.fit(point, torch.randn(64, 8), epochs=1, progress=False))
    assert panels[0].get_title() == "loss, which bounds nothing (RECONSTRUCTION)"
    assert len(panels[1].get_lines()) == 2, "a flat prior has no rate to draw"


COLUMNS = {"epoch": [1.0, 2.0]} | {
    name: [1.0, 2.0] for name in ("loss", "reconstruction", "kl", "active_units", "beta")
}


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"epoch": [1.0], "loss": [2.0]},
        None,
        "history",
        {**COLUMNS, "loss": None},
        {**COLUMNS, "loss": 3.0},
        {**COLUMNS, "loss": "ab"},
        {**COLUMNS, "loss": ["a", "b"]},
        {**COLUMNS, "loss": [1.0]},
        {**COLUMNS, "val_loss": [1.0]},
        {**COLUMNS, "epoch": [1.0, float("nan")]},
    ],
    ids=str,
)
def test_loss_curve_refuses_what_is_no_history(history: Any) -> None:
    with pytest.raises(ValueError, match=r"run_or_history must have .* active_units"):
        loss_curve(history)


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_reconstructions_put_the_data_above_the_decoder_means(shape: tuple[int, ...]) -> None:
    pair, x = probae.VAE(shape, 2, hidden=(8,)), torch.rand(20, *shape)
    ax = reconstructions(pair, x, columns=11)
    shown = sheet(ax)
    assert shown.shape[:2] == (6 + 1 + 6, 11 * 5 + 10)
    mean = probae.reconstruct(pair, x).mean
    for row, images in enumerate((x, mean)):
        expected = as_image(images[10])
        np.testing.assert_allclose(shown[row * 7 : row * 7 + 6, 60:65], expected, atol=1e-6)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["data", "reconstruction\n(decoder mean)"]


def test_reconstructions_show_no_more_than_there_is() -> None:
    pair = probae.VAE((1, 6, 5), 2, hidden=(8,))
    assert sheet(reconstructions(pair, torch.rand(3, 1, 6, 5))).shape == (13, 17)


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
@pytest.mark.parametrize("mean", [True, False])
def test_samples_are_those_of_the_seed(shape: tuple[int, ...], mean: bool) -> None:
    pair = probae.VAE(shape, 2, hidden=(8,))
    shown = sheet(samples(pair, 7, mean=mean, seed=5))
    assert shown.shape[:2] == (3 * 7 - 1, 3 * 6 - 1)
    x, z = probae.sample(pair, 7, seed=5)
    expected = pair.decoder(z).mean.detach() if mean else x
    np.testing.assert_allclose(shown[:6, 12:17], as_image(expected[2]), atol=1e-6)
    np.testing.assert_array_equal(shown[14:, 6:], 1.0, "no eighth and ninth image: white")
    np.testing.assert_array_equal(shown, sheet(samples(pair, 7, mean=mean, seed=5)))


def test_limits_are_black_and_white() -> None:
    pair = probae.UndercompleteAutoencoder((6, 5), 2, hidden=(8,))
    x = torch.full((1, 6, 5), -2.0)
    x[0, 0, 0], x[0, 0, 1] = 2.0, 9.0
    shown = sheet(reconstructions(pair, x, limits=(-2.0, 2.0)))
    assert shown[0, :3].tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="limits must be two increasing numbers"):
        reconstructions(pair, x, limits=(1.0, 1.0))


def test_loss_curve_names_a_run_of_another_kind() -> None:
    other = probae.fit_adversarial(probae.GAN(8, 2), torch.rand(64, 8), epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"got AdversarialRun; pass what probae\.fit returned"):
        loss_curve(other)  # type: ignore[arg-type]


def test_loss_curve_takes_arrays_and_shows_an_epoch_that_diverged() -> None:
    history = {name: np.array(column) for name, column in COLUMNS.items()}
    history["loss"][1] = history["active_units"][1] = np.nan
    losses, _, units = loss_curve(history)
    np.testing.assert_array_equal(losses.get_lines()[0].get_ydata(), [1, np.nan])
    assert units.get_ylim()[1] == pytest.approx(1.05)


@pytest.mark.parametrize("shape", [9, (2, 6, 5), (1, 1, 6, 5)])
def test_what_is_no_image_is_refused(shape: int | tuple[int, ...]) -> None:
    pair = probae.VAE(shape, 2, hidden=(8,))
    with pytest.raises(ValueError, match=r"pair must be on images .* x_dim=\(1, height, width\)"):
        samples(pair)
    with pytest.raises(ValueError, match="pair must be on images"):
        reconstructions(pair, torch.rand(3, *pair.x_shape))


def test_bad_counts_and_data_are_refused() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,))
    with pytest.raises(ValueError, match="columns must be an int >= 1, got 0"):
        reconstructions(pair, torch.rand(3, 6, 5), columns=0)
    with pytest.raises(ValueError, match="num_samples must be an int >= 1"):
        samples(pair, 0)
    with pytest.raises(ValueError, match="x must have shape"):
        reconstructions(pair, torch.rand(3, 5, 6))


@pytest.mark.parametrize("draw", [reconstructions, samples, traversals, tangent_planes, dictionary])
def test_a_pair_that_diverged_is_named(draw: Any) -> None:
    pair = probae.VAE((6, 5), 2, hidden=())
    with torch.no_grad():
        next(pair.decoder.parameters()).fill_(torch.nan)
    data = [torch.rand(3, 6, 5)] if draw in (reconstructions, tangent_planes) else []
    with pytest.raises(ValueError, match="pair has a parameter that is not finite, decoder"):
        draw(pair, *data)


def test_half_precision_is_drawn() -> None:
    pair = probae.VAE((6, 5), 3, hidden=()).to(torch.bfloat16)
    assert np.isfinite(sheet(dictionary(pair))).all()
    assert np.isfinite(sheet(tangent_planes(pair, torch.rand(2, 6, 5)))).all()
    rendered(latent_scatter(pair, torch.rand(4, 6, 5), torch.arange(4).to(torch.bfloat16)))


def test_pairs_without_a_prior_or_a_mean_are_refused() -> None:
    with pytest.raises(ValueError, match="flat prior"):
        samples(probae.UndercompleteAutoencoder((6, 5), 2, hidden=(8,)))
    classes = probae.VAE((6, 5), 2, likelihood="categorical")
    with pytest.raises(ValueError, match="mean is undefined"):
        samples(classes)
    assert sheet(samples(classes, 4, mean=False)).max() == 1


def test_pictures_render_with_titles_of_any_length_inside() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,))
    title = r"a $name that is no $\formula, " + "and goes on and on " * 5
    for drawn in (
        samples(pair, 1, title=title),
        samples(pair, 64, title=title),
        reconstructions(pair, torch.rand(2, 6, 5), title=title),
        reconstructions(pair, torch.rand(1, 6, 5), title=title),
        loss_curve(fitted(epochs=1), title=title[:60]),
    ):
        pixels = rendered(drawn)
        assert 300 < pixels.shape[1] < 2000
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge == 255).all() for edge in edges), "nothing is cut off at an edge"


def test_drawing_changes_neither_pair_nor_random_stream() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,))
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    samples(pair)
    samples(pair, mean=False)
    reconstructions(pair, torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.training
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())


def test_pyplot_knows_of_no_figure() -> None:
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), matplotlib.get_backend()
    samples(probae.VAE((6, 5), 2, hidden=(8,)))
    loss_curve(fitted(epochs=1))
    assert pyplot.get_fignums() == before
    assert matplotlib.get_backend() == backend
    assert not hasattr(plots, "pyplot")


# ---- walks, ranks and coverage -------------------------------------------------------------------


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_traversals_are_decoder_means_a_row_a_coordinate(shape: tuple[int, ...]) -> None:
    pair = probae.VAE(shape, 3, hidden=(8,))
    ax = traversals(pair, dimensions=[2, 0], num_steps=5)
    shown = sheet(ax)
    assert shown.shape[:2] == (2 * 7 - 1, 5 * 6 - 1)
    walk = probae.traverse(pair, dimensions=[2, 0], num_steps=5)
    for row in range(2):
        for column in range(5):
            expected = as_image(walk.x.mean[row, column])
            pixels = shown[row * 7 : row * 7 + 6, column * 6 : column * 6 + 5]
            np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["z[2]", "z[0]"]
    values = [f"{value:.3g}" for value in walk.values[0].tolist()]
    assert [label.get_text() for label in ax.get_xticklabels()] == values
    assert ax.get_xlabel() == "value of the coordinate"
    assert "around the mean of the prior" in title_of(ax)


def test_traversals_say_what_they_leave_out_and_where_they_start() -> None:
    pair = probae.VAE((6, 5), 12, hidden=(8,))
    ax = traversals(pair, num_steps=2)
    assert len(ax.get_yticklabels()) == 10
    assert "(the first 10 of 12 coordinates)" in title_of(ax)
    ax = traversals(pair, torch.rand(6, 5).round(), [11], [0.0, 1.0], space="x")
    assert "around the mean code of a datum" in title_of(ax)
    assert "first" not in title_of(ax)
    assert "around a code" in title_of(traversals(pair, torch.zeros(12), [11]))


def test_columns_of_different_values_are_not_labelled_as_one() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,), prior="mixture")
    ax = traversals(pair)
    assert ax.get_xticklabels() == []
    what = "value of the coordinate: low to high quantiles of its prior"
    assert ax.get_xlabel().replace("\n", " ") == what
    ax = traversals(pair, values=[[0.0], [1.0]])
    what = "value of the coordinate: as given for each row"
    assert ax.get_xlabel().replace("\n", " ") == what


def test_traversals_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(ValueError, match="pair must be on images"):
        traversals(probae.VAE(9, 2, hidden=(8,)))
    with pytest.raises(ValueError, match="mean is undefined"):
        traversals(probae.VAE((6, 5), 2, likelihood="categorical"))
    with pytest.raises(ValueError, match="limits must be two increasing numbers"):
        traversals(probae.VAE((6, 5), 2), limits=(1.0, 0.0))


def ranks_of(
    z_dim: int, num_simulations: int = 400, num_draws: int = 19
) -> probae.CalibrationRanks:
    return probae.simulation_based_calibration(
        probae.PPCA(z_dim + 1, z_dim), num_simulations, num_draws, seed=1
    )


@pytest.mark.parametrize("bins", [None, 7])
def test_rank_histograms_show_the_counts_and_the_band(bins: int | None) -> None:
    ranks = ranks_of(4)
    panels = calibration_ranks(ranks, bins)
    figure = panels[0].figure
    assert panels.tolist() == [axes for axes in figure.axes if axes.get_visible()]
    assert panels.shape == (5,)
    expected = ranks.expected(bins).numpy()
    low, high = stats.binom.interval(0.99, 400, expected / 400)
    for axes, name, counts, p in zip(
        panels, ranks.names, ranks.histogram(bins), ranks.p_values, strict=True
    ):
        bars, band, mean = (patch.get_data() for patch in axes.patches)
        assert bars.values.tolist() == counts.tolist()
        assert band.values.tolist() == high.tolist()
        assert np.asarray(band.baseline).tolist() == low.tolist()
        np.testing.assert_allclose(mean.values, expected)
        # each bin reaches half a rank beyond its first and last
        size = len(expected)
        of_rank = np.arange(20) * size // 20
        first = [int(np.argmax(of_rank == b)) for b in range(size)]
        assert bars.edges.tolist() == [*(np.array(first) - 0.5).tolist(), 19.5]
        assert axes.get_title() == f"{name}: p = {p:.2g}"
    bottoms = [axes.get_xlabel() for axes in panels if axes.get_xlabel()]
    assert bottoms == ["rank among 19 draws"] * 3
    assert f"p = {ranks.p_value:.2g} for 5 quantities" in title_of(panels)
    assert "99 % of bins" in figure.legends[0].get_texts()[1].get_text()


def test_ranks_of_many_quantities_are_lines_and_uneven_ones_have_names() -> None:
    ranks = ranks_of(11)  # one seed in a hundred has a name here, too
    (axes,) = calibration_ranks(ranks)
    drawn = axes.get_lines()
    assert len(drawn) == 13, "12 quantities and zero"
    assert drawn[0].get_label() == "12 quantities"
    table = ranks.table.double()
    for line, column in zip(drawn, table.unbind(1), strict=False):
        share = np.asarray(line.get_xdata())
        below = [(column < (value * 20).round()).double().mean().item() - value for value in share]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), below, atol=1e-12)
    crowded = ranks.table.clone()
    crowded[:, 3] = crowded[:, 3] // 2
    uneven = ranks._replace(ranks=crowded[:, :11], statistic_ranks=crowded[:, 11:])
    (axes,) = calibration_ranks(uneven, title="t")
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels.count("z[3]") == 1
    assert "the other 11 quantities" in labels
    assert axes.get_title() == "t"


def test_the_band_of_lines_holds_ninety_nine_of_a_hundred() -> None:
    # 1000 uniform tables of ranks; five standard errors of the share outside are 0.016
    table = torch.randint(0, 20, (200, 1000))
    ranks = probae.CalibrationRanks(table, table[:, :0], tuple(map(str, range(1000))), 19)
    (axes,) = calibration_ranks(ranks)
    path = axes.collections[0].get_paths()[0].vertices
    band = np.array([path[path[:, 0] == x, 1].max() for x in np.arange(21) / 20])
    counts = np.stack([np.bincount(column, minlength=20) for column in table.T.numpy()])
    lines_ = np.pad(counts.cumsum(1) / 200, ((0, 0), (1, 0))) - np.arange(21) / 20
    outside = (np.abs(lines_) > band + 1e-9).any(1).mean()
    assert abs(outside - 0.01) < 0.016


def test_coverage_is_drawn_against_its_level() -> None:
    measured = probae.expected_coverage(
        probae.PPCA(4, 2), 400, 19, levels=torch.tensor([0.9, 0.1, 0.5])
    )
    axes = coverage(measured)
    diagonal, curve = axes.get_lines()
    assert np.asarray(diagonal.get_ydata()).tolist() == [0, 1]
    assert np.asarray(curve.get_xdata()).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert np.asarray(curve.get_ydata()).tolist() == measured.coverage[[1, 2, 0]].tolist()
    edge = axes.collections[0].get_paths()[0].vertices
    top = edge[np.isclose(edge[:, 0], 0.5), 1].max()
    assert top == pytest.approx((measured.coverage + 2 * measured.std_error)[2].item())
    assert f"p = {measured.p_value:.2g}" in title_of(axes)
    assert "400 simulations" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert "nominal level" in axes.get_xlabel()


def test_ranks_and_coverage_of_something_else_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ranks must be what probae\.simulation_based_calibration"
    ):
        calibration_ranks(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"coverage must be what probae\.expected_coverage"):
        coverage(ranks_of(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bins must be at most the 20 ranks"):
        calibration_ranks(ranks_of(11), 21)


def test_figures_of_calibration_and_walks_render_inside() -> None:
    pair = probae.VAE((6, 5), 12, hidden=(8,))
    title = r"a $name that is no $\formula, " + "and goes on and on " * 5
    for drawn in (
        traversals(pair),
        traversals(pair, dimensions=[0]),
        traversals(pair, num_steps=3, dimensions=[1]),
        traversals(pair, title=title),
        traversals(pair, dimensions=[0], num_steps=1, title=title),
        calibration_ranks(ranks_of(1), title=title),
        calibration_ranks(ranks_of(8), title=title),
        calibration_ranks(ranks_of(9), title=title),
        coverage(probae.expected_coverage(probae.PPCA(4, 2), 20), title=title),
    ):
        pixels = rendered(drawn)
        assert 300 < pixels.shape[1] < 2000
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge == 255).all() for edge in edges), "nothing is cut off at an edge"


def as_image(x: Tensor) -> np.ndarray:
    """One datum as rows and columns of pixels."""
    if x.dim() == 3:
        x = x[0] if x.shape[0] == 1 else x.permute(1, 2, 0)
    return x.detach().numpy()


def legends(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_apart(ax: Axes) -> None:
    """The legend lies in the figure, and not on the axes or the label under them."""
    rendered(ax)
    figure: Any = ax.figure
    legend, box = ax.get_legend().get_window_extent(), figure.bbox
    assert box.x0 <= legend.x0
    assert legend.x1 <= box.x1
    assert box.y0 <= legend.y0
    assert legend.y1 <= ax.xaxis.label.get_window_extent().y0


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_the_legend_of_likelihoods_is_in_the_picture(count: int) -> None:
    pair = probae.PPCA(4, 2)
    ll = probae.log_likelihood(pair, torch.rand(20, 4))
    bound = ll._replace(is_bound=True, method="elbo")
    entries = {f"model number {i}": bound if i % 2 else ll for i in range(count)}
    assert_apart(likelihoods(entries))
    assert_apart(likelihoods(entries, "model number 0"))
    long = {f"{name} with a name that is long, longer, the longest": ll for name in entries}
    assert_apart(likelihoods(long, next(iter(long))))


@pytest.mark.parametrize("count", [1, 3, 9, 20])
def test_the_legend_of_a_scatter_is_in_the_picture(count: int) -> None:
    pair, x = probae.VAE(8, 2, hidden=(8,)), torch.rand(40, 8).round()
    ax = latent_scatter(pair, x, [f"class number {i % count}" for i in range(40)])
    assert_apart(ax)
    assert ax.get_window_extent().height > 150, "room is left for the picture"
    figure = Figure(figsize=(8, 4), layout="constrained")
    assert_apart(latent_scatter(pair, x, ["aa", "bb"] * 20, ax=figure.subplots(1, 2)[0]))


def test_twenty_classes_are_told_apart_without_colours() -> None:
    pair, x = probae.VAE(8, 2, hidden=(8,)), torch.rand(40, 8).round()
    ax = latent_scatter(pair, x, [f"class {i % 20:02}" for i in range(40)])
    looks = {
        (points.get_paths()[0].vertices.tobytes(), len(points.get_facecolor()) > 0)
        for points in ax.collections
    }
    assert len(looks) == 20, "mark, and whether it is filled"
    luminance = [
        float(np.dot(points.get_edgecolor()[0][:3], [0.299, 0.587, 0.114]))
        for points in ax.collections
    ]
    assert max(luminance) < 0.75, "none is too light to see on white"


def test_names_in_legends_are_taken_as_they_stand() -> None:
    pair, x = probae.VAE(8, 2, hidden=(8,)), torch.rand(8, 8).round()
    ax = latent_scatter(pair, x, [r"$\frac$", "_hidden", "", "a" * 99] * 2)
    rendered(ax)
    assert legends(ax)[2:] == ['""', r"$\frac$", " _hidden", f"{'a' * 39}…"]
    ax = latent_scatter(pair, x, torch.tensor([1.0, 2.5]).repeat(4))
    assert legends(ax)[2:] == ["1", "2.5"]
    ll = probae.log_likelihood(probae.PPCA(4, 2), torch.rand(9, 4))
    rendered(likelihoods({r"$\frac$": ll, "_b": ll, 3: ll}, r"$\frac$"))
    ranks = ranks_of(11)
    uneven = ranks._replace(ranks=ranks.ranks // 2, names=(r"$\frac$", "_b", *ranks.names[2:]))
    (ax,) = calibration_ranks(uneven)
    rendered(ax)
    figure: Any = ax.figure
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {r"$\frac$", " _b"} & set(named)


def test_eight_uneven_lines_are_told_apart_without_colours() -> None:
    ranks = ranks_of(11)
    (ax,) = calibration_ranks(ranks._replace(ranks=ranks.ranks // 2))
    drawn = [line for line in ax.get_lines() if str(line.get_label()).startswith("z[")]
    assert len(drawn) == 8
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 8


def test_a_p_value_of_zero_is_not_claimed() -> None:
    ranks = ranks_of(2)
    one = ranks._replace(ranks=torch.zeros_like(ranks.ranks))
    assert "p < 1e-16 for 3 quantities" in title_of(calibration_ranks(one))
    assert calibration_ranks(one)[0].get_title() == "z[0]: p < 1e-16"


# ---- axes that are given, and pyplot -------------------------------------------------------------


def drawers() -> dict[str, Any]:
    """Every function of one panel, of its Axes alone."""
    pair = probae.VAE((6, 5), 3, hidden=(8,))
    x = torch.rand(40, 6, 5, generator=torch.Generator().manual_seed(0))
    linear = probae.PPCA((6, 5), 3)
    plane = probae.DenoisingAutoencoder(2, 8)
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    ll = probae.log_likelihood(linear, x)
    measured = probae.expected_coverage(probae.PPCA(4, 2), 20)
    return {
        "reconstructions": lambda **options: reconstructions(pair, x, **options),
        "samples": lambda **options: samples(pair, 9, **options),
        "traversals": lambda **options: traversals(pair, num_steps=3, **options),
        "latent_scatter": lambda **options: latent_scatter(pair, x, **options),
        "dictionary": lambda **options: dictionary(linear, **options),
        "code_histogram": lambda **options: code_histogram(pair, x, **options),
        "score_field": lambda **options: score_field(plane, points, **options),
        "tangent_planes": lambda **options: tangent_planes(plane, points, **options),
        "tangent_images": lambda **options: tangent_planes(pair, x, **options),
        "coverage": lambda **options: coverage(measured, **options),
        "likelihoods": lambda **options: likelihoods({"PPCA": ll, "again": ll}, **options),
    }


NAMES = [
    "reconstructions",
    "samples",
    "traversals",
    "latent_scatter",
    "dictionary",
    "code_histogram",
    "score_field",
    "tangent_planes",
    "tangent_images",
    "coverage",
    "likelihoods",
]


@pytest.mark.parametrize("name", NAMES)
def test_axes_that_are_given_are_drawn_in_and_come_back(name: str) -> None:
    draw = drawers()[name]
    figure = Figure(figsize=(6, 5), layout="constrained")
    given = figure.subplots(1, 2)[1]
    assert draw(ax=given) is given
    assert given.get_title()
    assert not figure.axes[0].has_data(), "the other panel is left alone"
    alone = draw(title=r"a $name that is no $\formula, " + "and goes on and on " * 5)
    assert isinstance(alone, Axes)
    assert alone.figure is not figure
    pixels = rendered(alone)
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 255).all() for edge in edges), "nothing is cut off at an edge"
    for wrong in (figure, "ax", np.array([given, given]), figure.add_subplot(projection="polar")):
        with pytest.raises(ValueError, match=r"ax must be a plain matplotlib Axes, got .*subplots"):
            draw(ax=wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("title", [5, True, ["a"], b"a", {}])
def test_what_is_no_title_is_refused(name: str, title: Any) -> None:
    with pytest.raises(ValueError, match="title must be a string, or None for the default, got"):
        drawers()[name](title=title)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_title_is_none(name: str) -> None:
    assert drawers()[name](title="").get_title() == ""


def test_panels_take_titles_only() -> None:
    for draw in (
        lambda: loss_curve(COLUMNS, title=5),
        lambda: calibration_ranks(ranks_of(2), title=5),
    ):
        with pytest.raises(ValueError, match="title must be a string"):
            draw()


@pytest.mark.parametrize("name", ["reconstructions", "samples", "traversals", "tangent_planes"])
@pytest.mark.parametrize(
    "limits",
    [5, None, "ab", (1, 0), (0, 0), (1, 2, 3), (0, float("nan")), (0, float("inf")), ("a", "b"),
     (None, 1), (False, True), [[0], [1]], torch.tensor(1.0)],
    ids=str,
)  # fmt: skip
def test_what_are_no_limits_is_refused(name: str, limits: Any) -> None:
    with pytest.raises(ValueError, match="limits must be two increasing numbers"):
        drawers()[name](limits=limits)


def test_panels_that_are_given_are_drawn_in_and_come_back() -> None:
    run, ranks, many = fitted(epochs=2), ranks_of(3, 60), ranks_of(11, 60)
    for count, draw in (
        (3, lambda axes: loss_curve(run, title="my VAE", axes=axes)),
        (4, lambda axes: calibration_ranks(ranks, axes=axes)),
        (1, lambda axes: calibration_ranks(many, axes=axes)),
    ):
        figure = Figure(figsize=(6 * count, 5), layout="constrained")
        grid = figure.subplots(1, count + 1)
        drawn = draw(grid[:count])
        assert drawn.tolist() == grid[:count].tolist()
        assert all(axes.has_data() for axes in drawn)
        assert not grid[count].has_data()
        assert not figure.get_suptitle(), "a title of someone else's figure is not ours to set"
        for wrong in (
            grid,
            grid[: count - 1],
            figure,
            None if count == 1 else grid[0],
            [1] * count,
        ):
            if wrong is None:
                continue
            with pytest.raises(ValueError, match=rf"axes must hold {count} plain matplotlib Axes"):
                draw(wrong)
    square = Figure().subplots(2, 2)
    assert calibration_ranks(ranks, axes=square).shape == (4,)
    single = Figure().subplots()
    assert calibration_ranks(many, axes=single).tolist() == [single]
    axes = Figure().subplots(1, 3)
    assert loss_curve(run, title="my VAE", axes=list(axes))[0].get_title().startswith("my VAE\n")


def test_an_interactive_pyplot_is_given_the_figure_to_show() -> None:
    from matplotlib import pyplot

    pair, before = probae.VAE((6, 5), 2, hidden=(8,)), pyplot.get_fignums()
    with pyplot.ion():
        ax = samples(pair, 4)
        assert pyplot.gcf() is ax.figure
    pyplot.close(ax.figure)
    assert pyplot.get_fignums() == before


def test_a_notebook_is_given_the_figure_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    def get_ipython() -> object:
        return object()

    shell = types.ModuleType("IPython")
    monkeypatch.setattr(shell, "get_ipython", get_ipython, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    ax = samples(probae.VAE((6, 5), 2, hidden=(8,)), 4)
    assert pyplot.gcf() is ax.figure
    pyplot.close(ax.figure)
    monkeypatch.setattr(shell, "get_ipython", lambda: None)  # imported, but not running
    samples(probae.VAE((6, 5), 2, hidden=(8,)), 4)
    assert not pyplot.get_fignums()


def test_plots_are_there_without_an_import_of_their_own() -> None:
    assert probae.plots is plots
    assert probae.__getattr__("plots") is plots


def test_a_script_may_draw_any_number_of_pictures() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    ll = probae.log_likelihood(probae.PPCA(3, 2), torch.zeros(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of more than 20 figures
        for _ in range(25):
            likelihoods({"PPCA": ll})
    assert pyplot.get_fignums() == before


# ---- codes and atoms -----------------------------------------------------------------------------


def offsets(ax: Axes) -> np.ndarray:
    """Places of all points, one scatter after the other."""
    return np.concatenate([np.asarray(points.get_offsets()) for points in ax.collections])


def test_scatter_shows_the_mean_codes_of_each_class() -> None:
    pair, x = probae.VAE(8, 3, hidden=(8,)), torch.rand(60, 8).round()
    labels = torch.arange(60) % 4
    ax = latent_scatter(pair, x, labels, dims=(2, 0))
    means = pair.encoder(x).mean.detach()[:, [2, 0]].double().numpy()
    for kind, points in enumerate(ax.collections):
        np.testing.assert_allclose(points.get_offsets(), means[labels.numpy() == kind], atol=1e-6)
    assert len(ax.collections) == 4
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[2]", "z[0]")
    shades = [points.get_facecolor()[0].mean() for points in ax.collections]
    assert len({round(float(shade), 6) for shade in shades}) == 4
    ax = latent_scatter(pair, x, ["even", "odd"] * 30)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["holds 95% of the prior", "holds 50% of the prior", "even", "odd"]
    paths = [points.get_paths()[0].vertices for points in ax.collections]
    assert paths[0].shape != paths[1].shape, "marks differ, not shades alone"


def test_rings_hold_their_share_of_the_prior() -> None:
    pair, x = probae.VAE(8, 2, hidden=(8,)), torch.rand(20, 8).round()
    rings = latent_scatter(pair, x).patches
    z = probae.sample(pair, 40_000, seed=0).z.numpy()
    for ring, mass in zip(rings, (0.95, 0.5), strict=True):
        inside = ring.get_patch_transform().inverted().transform(z)
        share = (np.linalg.norm(inside, axis=1) < 1).mean()
        assert abs(share - mass) < 0.0125  # five standard errors
    flat = probae.UndercompleteAutoencoder(8, 2, hidden=(8,))
    assert not latent_scatter(flat, x).patches, "a flat prior holds nothing"


def test_scatter_takes_labels_on_a_scale() -> None:
    pair, x = probae.VAE(8, 2, hidden=(8,)), torch.rand(60, 8).round()
    ax = latent_scatter(pair, x, torch.linspace(0, 1, 60))
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_array(), np.linspace(0, 1, 60), atol=1e-6)
    assert len(ax.figure.axes) == 2, "the scale"


def test_scatter_refuses_what_it_cannot_draw() -> None:
    pair, x = probae.VAE(8, 3, hidden=(8,)), torch.rand(30, 8).round()
    for labels in (torch.zeros(29), torch.zeros(30, 1), "abc"):
        with pytest.raises(ValueError, match="labels must be 30, one a datum"):
            latent_scatter(pair, x, labels)
    nan = float("nan")
    for labels in (
        [nan] * 30,
        [0, nan] * 15,
        [None] * 30,
        ["a", None] * 15,
        [object()] * 30,
        [1j] * 30,
    ):
        with pytest.raises(ValueError, match="labels must be all numbers or all strings"):
            latent_scatter(pair, x, labels)
    with pytest.raises(ValueError, match="labels must be 30, one a datum: "):
        latent_scatter(pair, x, [[1, 2], [3]])
    with pytest.raises(ValueError, match="labels must be numbers, or at most 20 names, got 30"):
        latent_scatter(pair, x, [f"name {i}" for i in range(30)])
    for dims in ((0, 3), (0, -1), (0, 0.5), (True, 2), 1, "01"):
        with pytest.raises(ValueError, match="dims must be one or more ints from 0 to 2"):
            latent_scatter(pair, x, dims=dims)
    for dims in ((0,), (0, 1, 2), (1, 1)):
        with pytest.raises(ValueError, match="dims must be two different places"):
            latent_scatter(pair, x, dims=dims)
    with pytest.raises(ValueError, match=r"two dimensions or more .* code_histogram"):
        latent_scatter(probae.VAE(8, 1, hidden=(8,)), x)
    with pytest.raises(ValueError, match="x must have shape"):
        latent_scatter(pair, x[:, :5])
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder"):
        latent_scatter(torch.nn.Linear(8, 2), x)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_dictionary_shows_the_columns_of_the_decoder_by_norm(likelihood: str) -> None:
    pair = probae.VAE((6, 5), 5, hidden=(), likelihood=likelihood)
    weight, _ = pair.decoder.network.affine()
    order = weight.norm(dim=0).argsort(descending=True)
    shown = sheet(dictionary(pair, num=3))
    assert shown.shape == (2 * 7 - 1, 2 * 6 - 1)
    atom = weight[:, order[1]].detach().reshape(6, 5)
    expected = 0.5 + 0.5 * atom / atom.abs().max()
    np.testing.assert_allclose(shown[:6, 6:11], expected, atol=1e-5)
    np.testing.assert_array_equal(shown[7:, 6:], 1.0)
    assert title_of(dictionary(pair, num=3)) == "VAE: 3 of 5 atoms by norm (grey is 0)"


def test_dictionary_goes_by_what_each_atom_adds_to_data() -> None:
    pair = probae.SparseAutoencoder((6, 5), 40, prior="subset", num_active=2)
    x = torch.randn(50, 6, 5)
    use = pair.encoder(x).mean.abs().mean(0)  # atoms of unit norm
    atom = pair.decoder.network.affine()[0][:, use.argmax()].detach().reshape(6, 5)
    shown = sheet(dictionary(pair, x=x))[:6, :5]
    np.testing.assert_allclose(shown, 0.5 + 0.5 * atom / atom.abs().max(), atol=1e-5)
    assert "40 atoms by use" in title_of(dictionary(pair, x=x))


def test_dictionary_knows_an_affine_decoder_from_others() -> None:
    tied = probae.MLP((6, 5), 4)
    decoder = probae.GaussianDecoder(probae.TransposedMLP(tied))
    pair = probae.Autoencoder(probae.FlatPrior(4), probae.PointEncoder(tied), decoder)
    atoms = tied.affine()[0].detach().reshape(4, 6, 5)
    first = atoms[atoms.flatten(1).norm(dim=1).argmax()]
    shown = sheet(dictionary(pair))[:6, :5]
    np.testing.assert_allclose(shown, 0.5 + 0.5 * first / first.abs().max(), atol=1e-5)
    for bent in (
        probae.VAE((6, 5), 4, hidden=(8,)),
        probae.VAE((6, 5), 4, hidden=(8,), activation="tanh", likelihood="gaussian"),
        probae.VAE((6, 5), 4, hidden=(), likelihood="poisson"),
    ):
        with pytest.raises(ValueError, match=r"affine in z, .*build it with hidden=\(\)"):
            dictionary(bent)
    with pytest.raises(ValueError, match="num must be an int >= 1"):
        dictionary(pair, 0)
    broken = probae.PPCA((6, 5), 2)
    with torch.no_grad():
        broken.decoder.network.output.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="pair has a parameter that is not finite"):
        dictionary(broken)
    with pytest.raises(ValueError, match="pair must be on images"):
        dictionary(probae.PPCA(9, 2))


def test_code_histogram_is_the_density_of_draws_beside_that_of_the_prior() -> None:
    pair, x = probae.VAE(8, 3, hidden=(8,)), torch.rand(500, 8).round()
    ax = code_histogram(pair, x, dims=[2], bins=10, seed=4)
    (bars,) = ax.patches
    heights, edges, _ = bars.get_data()
    torch.manual_seed(4)
    codes = pair.encoder(x).sample()[:, 2].double().numpy()
    np.testing.assert_allclose(heights, np.histogram(codes, edges)[0] / 500 / np.diff(edges))
    (line,) = ax.get_lines()
    t = np.asarray(line.get_xdata())
    np.testing.assert_allclose(line.get_ydata(), stats.norm.pdf(t), rtol=1e-4)
    assert ax.get_xlabel() == "z[2]"
    assert code_histogram(pair, x).get_xlabel() == "z, 3 coordinates"


def test_mass_at_zero_is_named_and_left_out_of_the_density() -> None:
    pair = probae.SparseAutoencoder(8, 20, prior="exponential", rate=2.0)
    x = torch.randn(400, 8)
    codes = pair.encoder(x).mean.detach()
    share = float((codes == 0).double().mean())
    assert share > 0.1
    ax = code_histogram(pair, x)
    heights, edges, _ = ax.patches[0].get_data()
    assert float((heights * np.diff(edges)).sum()) == pytest.approx(1 - share, abs=2e-3)
    assert f"{share:.0%} are exactly 0" in ax.get_legend().get_texts()[0].get_text()
    t, density = (np.asarray(values) for values in ax.get_lines()[0].get_data())
    np.testing.assert_allclose(density, np.where(t < 0, 0, 2 * np.exp(-2 * t)), rtol=1e-4)


def test_priors_without_a_density_of_one_coordinate_are_drawn_by_their_draws() -> None:
    mixed = probae.VAE(8, 2, hidden=(8,), prior="mixture")
    x = torch.rand(50, 8).round()
    codes, prior = code_histogram(mixed, x).patches
    values, edges, _ = prior.get_data()
    # all but about one in a hundred draws lie in the window
    assert float((values * np.diff(edges)).sum()) > 0.97
    assert codes.get_label() == "codes"
    bits = probae.SemanticHashing(8, 4, posterior="bernoulli")
    ax = code_histogram(bits, x)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[0] + heights[1] == pytest.approx(1)
    assert abs(heights[2] - 0.5) < 0.01  # 200 000 draws
    flat = code_histogram(probae.UndercompleteAutoencoder(8, 2, hidden=(8,)), x)
    assert not flat.get_lines()
    assert "its prior is flat" in title_of(flat)


def test_codes_that_are_all_zero_have_a_picture() -> None:
    pair = probae.UndercompleteAutoencoder(8, 2, hidden=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = code_histogram(pair, torch.zeros(5, 8))
        rendered(ax)
    assert legends(ax) == ["codes (100% are exactly 0, not drawn)"]


def test_code_histogram_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="bins must be at most 10000, got 1000000000"):
        code_histogram(probae.VAE(8, 2, hidden=(8,)), torch.rand(5, 8).round(), bins=10**9)
    pair, x = probae.VAE(8, 3, hidden=(8,)), torch.rand(30, 8).round()
    with pytest.raises(ValueError, match="bins must be an int >= 1"):
        code_histogram(pair, x, bins=0)
    for dims in ([3], [], [0.5], 1):
        with pytest.raises(ValueError, match="dims must be one or more ints from 0 to 2"):
            code_histogram(pair, x, dims=dims)
    with pytest.raises(ValueError, match="x must have shape"):
        code_histogram(pair, x[:, :2])


# ---- fields and planes ---------------------------------------------------------------------------


def shrinking(scale: float) -> probae.Autoencoder:
    """The best denoiser of N(0, I) in the plane, r(x) = x / (1 + σ²); its score: -x / (1 + σ²)."""
    encoder, decoder = probae.MLP(2, 2), probae.MLP(2, 2)
    with torch.no_grad():
        encoder.output.weight.copy_(torch.eye(2))
        decoder.output.weight.copy_(torch.eye(2) / (1 + scale**2))
    return probae.Autoencoder(
        probae.FlatPrior(2),
        probae.PointEncoder(encoder),
        probae.GaussianDecoder(decoder),
        probae.GaussianNoise(scale),
    )


def test_score_field_points_uphill_and_is_as_long_as_the_score() -> None:
    ax = score_field(shrinking(0.5), limits=(-2, 2), num=5)
    (field,) = ax.collections
    at = np.asarray(field.get_offsets())
    assert at.min() == -2
    assert at.max() == 2
    arrows = np.stack([field.U, field.V], 1)
    score = -at / 1.25
    np.testing.assert_allclose(field.get_array(), np.linalg.norm(score, axis=1), atol=1e-6)
    cross = arrows[:, 0] * score[:, 1] - arrows[:, 1] * score[:, 0]
    np.testing.assert_allclose(cross, 0, atol=1e-6)
    assert ((arrows * score).sum(1) >= 0).all()
    assert np.linalg.norm(arrows, axis=1).max() <= 1 + 1e-6, "arrows do not reach the next"
    assert "nats per unit of x" in ax.figure.axes[1].get_ylabel()


def test_score_field_takes_its_window_from_data_or_limits() -> None:
    pair, x = shrinking(0.5), torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    arrows = score_field(pair, x, num=3).collections[1]
    at = np.asarray(arrows.get_offsets())
    np.testing.assert_allclose(at.min(0), [-0.2, 0.6], atol=1e-6)
    np.testing.assert_allclose(at.max(0), [2.2, 5.4], atol=1e-6)
    (arrows,) = score_field(pair, limits=((0, 1), (5, 9)), num=3).collections
    assert np.asarray(arrows.get_offsets()).max(0).tolist() == [1, 9]
    for limits in ((1, 0), (0, float("inf")), "ab", (1, 2, 3), ((0, 1), (1, 1))):
        with pytest.raises(ValueError, match="limits must be two increasing numbers"):
            score_field(pair, limits=limits)
    with pytest.raises(ValueError, match="num must be an int >= 2"):
        score_field(pair, num=1)
    with pytest.raises(ValueError, match="num must be at most 200"):
        score_field(pair, num=10**5)
    with pytest.raises(ValueError, match=r"points in the plane, of x_shape \(2,\), got \(3,\)"):
        score_field(probae.DenoisingAutoencoder(3, 4))
    with pytest.raises(ValueError, match="pair must have the corruption GaussianNoise"):
        score_field(probae.VAE(2, 2, likelihood="gaussian"))


def test_arrows_of_a_long_window_are_as_far_apart_as_in_a_square() -> None:
    ax = score_field(shrinking(0.5), limits=((-4, 4), (-1, 1)), num=9)
    (field,) = ax.collections
    at = np.asarray(field.get_offsets())
    assert np.unique(at[:, 0]).tolist() == list(range(-4, 5))
    assert np.unique(at[:, 1]).tolist() == [-1, 0, 1]
    assert ax.figure.get_figheight() < 4 < score_field(shrinking(0.5)).figure.get_figheight()
    assert field.get_clim()[0] == 0, "shade and length say the same"
    shades = field.get_cmap()(np.linspace(0, 1, 50))[:, :3] @ np.array([0.299, 0.587, 0.114])
    assert shades.max() < 0.75, "the shortest arrow is seen on white"
    assert (np.diff(shades) < 0).all(), "in greys, too, longer is darker"


def test_tangents_are_lines_along_the_first_direction() -> None:
    pair = probae.PPCA(2, 1)
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    ax = tangent_planes(pair, x, num_points=7)
    drawn = ax.get_lines()
    assert len(drawn) == 7
    axis = pair.decoder.network.affine()[0].detach()[:, 0].numpy()
    for line in drawn:
        ends = np.stack(line.get_data(), 1)
        along = ends[1] - ends[0]
        cosine = along @ axis / np.linalg.norm(along) / np.linalg.norm(axis)
        assert abs(cosine) == pytest.approx(1, abs=1e-5)
        assert np.abs(x.numpy() - ends.mean(0)).sum(1).min() < 1e-6, "its middle is a datum"


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_tangents_of_images_stand_beside_them(shape: tuple[int, ...]) -> None:
    pair, x = probae.VAE(shape, 4, hidden=(8,)), torch.rand(3, *shape)
    ax = tangent_planes(pair, x, num_directions=2)
    shown = sheet(ax)
    assert shown.shape[:2] == (3 * 7 - 1, 3 * 6 - 1)
    basis = probae.tangent_basis(pair, x).basis
    for row in range(3):
        np.testing.assert_allclose(shown[row * 7 : row * 7 + 6, :5], as_image(x[row]), atol=1e-6)
        for k in range(2):
            direction = basis[row, :, k].reshape(shape)
            expected = 0.5 + 0.5 * direction / direction.abs().max()
            pixels = shown[row * 7 : row * 7 + 6, 6 * (k + 1) : 6 * (k + 1) + 5]
            np.testing.assert_allclose(pixels, as_image(expected), atol=1e-5)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["datum", "1st", "2nd"]
    assert "encoder's Jacobian" in tangent_planes(pair, x, of="encoder").get_xlabel().replace(
        "\n", " "
    )


def test_directions_of_an_encoder_are_not_called_tangents() -> None:
    pair, x = probae.PPCA(2, 1), torch.randn(9, 2)
    ax = tangent_planes(pair, x)
    assert legends(ax) == ["data", "tangents"]
    assert title_of(ax) == "PPCA: tangents at 9 data"
    ax = tangent_planes(pair, x, of="encoder")
    assert legends(ax) == ["data", "where the code moves most"]
    assert title_of(ax) == "PPCA: most sensitive directions of the encoder at 9 data"


def test_tangents_refuse_what_they_cannot_draw() -> None:
    pair, x = probae.VAE((6, 5), 2, hidden=(8,)), torch.rand(3, 6, 5)
    with pytest.raises(ValueError, match=r"x_shape \(2,\), or on images .* got \(3,\)"):
        tangent_planes(probae.PPCA(3, 1), torch.rand(3, 3))
    for options in ({"num_points": 0}, {"num_directions": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be an int >= 1"):
            tangent_planes(pair, x, **options)
    with pytest.raises(ValueError, match="of must be"):
        tangent_planes(pair, x, of="decoder")


# ---- likelihoods ---------------------------------------------------------------------------------


def bars(ax: Axes) -> list[tuple[float, float, float]]:
    """Middle, low end and high end of each error bar, from top to bottom."""
    drawn = []
    for container in ax.containers:
        middle, _, (whisker,) = container.lines
        (low, _), (high, _) = whisker.get_segments()[0]
        drawn.append((float(middle.get_xdata()[0]), float(low), float(high)))
    return drawn


def test_likelihoods_show_means_and_two_standard_errors() -> None:
    pair = probae.PPCA(6, 2)
    x = probae.sample(pair, 50, seed=0).x
    exact = probae.log_likelihood(pair, x)
    near = exact._replace(is_bound=True, method="iwae", ess=torch.ones(50), khat=torch.zeros(50))
    far = near._replace(values=exact.values - 3 - 0.1 * torch.randn(50), method="elbo")
    ax = likelihoods({"exact": exact, "IWAE": near, "poor": far})
    for (mean, low, high), ll in zip(bars(ax), (exact, near, far), strict=True):
        assert mean == pytest.approx(ll.mean, rel=1e-6)
        assert high - mean == pytest.approx(2 * ll.mean_std_error, rel=1e-5)
        assert mean - low == pytest.approx(2 * ll.mean_std_error, rel=1e-5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["exact", "IWAE", "poor"]
    assert ax.yaxis_inverted()
    marks = [container.lines[0].get_marker() for container in ax.containers]
    assert marks == ["s", ">", ">"]
    faces = [container.lines[0].get_markerfacecolor() for container in ax.containers]
    assert faces == ["C0", "C0", "white"], "the ELBO claims no nearness"
    claims = [text.get_text() for text in ax.get_legend().get_texts()]
    assert claims == ["exact", "lower bound, near by its own diagnostics", "lower bound"]

    paired = likelihoods({"exact": exact, "IWAE": near, "poor": far}, "exact")
    difference = (far.values - exact.values).double()
    mean, low, high = bars(paired)[2]
    assert mean == pytest.approx(float(difference.mean()), rel=1e-5)
    assert high - low == pytest.approx(4 * float(difference.std()) / 50**0.5, rel=1e-4)
    assert bars(paired)[0] == (0, 0, 0)
    assert "less exact, paired" in paired.get_xlabel()
    one = probae.log_likelihood(pair, x[:1])
    (text,) = likelihoods({"one": one}).texts
    assert text.get_text() == f"{one.mean:.2f}", "of one datum there is no standard error"


def test_a_sandwich_has_two_ends() -> None:
    pair = probae.PPCA(6, 2)
    x, z = probae.sample(pair, 20, seed=0)
    exact = probae.log_likelihood(pair, x).values
    sandwich = probae.Sandwich(exact - torch.rand(20), exact + 1, torch.ones(20), x, z)
    ax = likelihoods({"BDMC": sandwich, "exact": probae.log_likelihood(pair, sandwich.x)}, "exact")
    low, high, zero = (mean for mean, _, _ in bars(ax))
    assert low == pytest.approx(float((sandwich.lower - exact).mean()), abs=1e-5)
    assert high == pytest.approx(float((sandwich.upper - exact).mean()), abs=1e-5)
    assert zero == 0
    assert [container.lines[0].get_marker() for container in ax.containers] == [">", "<", "s"]


def test_likelihoods_of_unlike_things_are_refused() -> None:
    x = torch.rand(20, 6)
    dense = probae.log_likelihood(probae.PPCA(6, 2), x)
    for wrong in ({}, [dense], dense):
        with pytest.raises(ValueError, match="entries must be a dict of names"):
            likelihoods(wrong)
    with pytest.raises(ValueError, match=r"entries must be what .* got float under 'a'"):
        likelihoods({"a": 1.0})
    bits = probae.log_likelihood(probae.VAE(6, 2), x.round(), "elbo")
    with pytest.raises(ValueError, match=r"densities in 6 .* probabilities in 6"):
        likelihoods({"a": dense, "b": bits})
    other = probae.log_likelihood(probae.PPCA(5, 2), x[:, :5])
    with pytest.raises(ValueError, match="the same data to compare, got"):
        likelihoods({"a": dense, "b": other})
    with pytest.raises(ValueError, match=r"reference must be a name .* one of 'a', got 'b'"):
        likelihoods({"a": dense}, "b")
    with pytest.raises(ValueError, match=r"reference must be a name .* got \['a'\]"):
        likelihoods({"a": dense}, ["a"])
    for gone in (torch.nan, -torch.inf):
        lost = dense._replace(values=torch.full((20,), gone))
        with pytest.raises(ValueError, match=r"entries must be finite .* 20 values under 'b'"):
            likelihoods({"a": dense, "b": lost})
    fewer = probae.log_likelihood(probae.PPCA(6, 2), x[:10])
    with pytest.raises(ValueError, match="the same data as the reference, got 20 under 'a', 10"):
        likelihoods({"a": dense, "b": fewer}, "a")
    assert len(likelihoods({"a": dense, "b": fewer}).containers) == 2
