"""The dictionaries of natural-image patches, as a test that takes about three minutes on a core."""

import json

import pytest
import torch

from . import patches_dictionary


@pytest.mark.slow
def test_dictionary_as_good_as_scikit_learns_and_a_fast_predictor() -> None:
    result, _ = patches_dictionary.run()
    print(patches_dictionary.table(result))
    assert result["kind"] == "MAP_JOINT"
    for row in result["comparison"]:
        assert row["l0"] == pytest.approx(row["their_l0"], rel=0.01)
        assert row["ratio"] <= 1.05
    ours, noise = result["atom_shape"]["probae"], result["atom_shape"]["white noise"]
    assert ours["localisation"] > 1.8 * noise["localisation"]
    assert ours["orientation"] > 5 * noise["orientation"]
    psd = result["psd"]
    assert psd["worst_kkt"] <= 1e-6
    assert psd["speedup"]["fista_1e-6"] >= 100
    for energy in psd["energy"].values():  # the predictor gets most of the way to the minimum
        assert energy["predicted"] - energy["minimum"] < 0.2 * (
            energy["zero_code"] - energy["minimum"]
        )


def test_the_experiment_runs_end_to_end_in_small() -> None:
    result, pictures = patches_dictionary.run(epochs=1, atoms=30, limit=500, repeats=1, l0s=(5,))
    (row,) = result["comparison"]
    assert row["l0"] == pytest.approx(5, abs=0.1)
    assert 0.5 < row["ratio"] < 1.5
    assert row["error"] < 0.95 * result["test_energy_of_zero_code"]
    assert result["psd"]["amortisation_gap"]["psd"][0] > 0
    assert set(pictures) == {"patches_dictionary", "patches_psd"}
    assert "scikit-learn" in patches_dictionary.table(result)
    json.dumps(result)


def test_shapes_of_known_atoms() -> None:
    side = patches_dictionary.SIDE
    y, x = torch.meshgrid(torch.arange(side) - 4.0, torch.arange(side) - 5.0, indexing="ij")
    grating = torch.cos(2.0 * x)
    gabor = grating * torch.exp(-(x**2 + y**2) / 4)
    atoms = torch.stack([grating, gabor]).flatten(1).T
    wide, narrow = patches_dictionary.localisation(atoms).tolist()
    assert 0.2 < wide < 0.35
    assert narrow > 0.9
    assert (patches_dictionary.orientation(atoms) > 0.7).all()
