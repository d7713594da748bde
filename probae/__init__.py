"""Probabilistic autoencoders as Pyro guide/model pairs."""

from importlib import import_module
from typing import TYPE_CHECKING

from .adversarial import AdversarialELBO, AdversarialRun, adversarial_elbo, fit_adversarial
from .adversarial_presets import GAN, AdversarialAutoencoder, AdversarialVariationalBayes
from .annealing import Annealing, Sandwich, bdmc
from .arviz import to_arviz
from .autoencoder import Autoencoder, Kind
from .calibration import (
    CalibrationRanks,
    Coverage,
    expected_coverage,
    simulation_based_calibration,
)
from .chains import (
    AnnealedSamples,
    Chain,
    LangevinChain,
    PosteriorSamples,
    annealed_denoising,
    gsn_chain,
    langevin,
    posterior_samples,
)
from .code_index import Ball, CodeIndex, Neighbours
from .corruptions import (
    BitFlip,
    Corruption,
    GaussianNoise,
    Masking,
    PoissonThinning,
    SaltAndPepper,
    stack_missing,
)
from .datasets import as_tensor, binarize, dequantize, load_dataset
from .decoders import (
    LIKELIHOODS,
    BernoulliDecoder,
    CategoricalDecoder,
    ContinuousBernoulliDecoder,
    CorruptedDecoder,
    Decoder,
    DiscretizedLogisticDecoder,
    GaussianDecoder,
    HeteroscedasticGaussianDecoder,
    PoissonDecoder,
)
from .discriminators import Discriminator, ImplicitEncoder, NoEncoder
from .distributed import shared_log_likelihood
from .distributions import ContinuousBernoulli, DiscretizedLogistic, GreyBernoulli
from .embedding import EmbeddingComparison, EmbeddingScore, compare_embeddings
from .encoders import (
    BernoulliEncoder,
    CategoricalEncoder,
    GaussianEncoder,
    LaplaceEncoder,
    LinearGaussianPosterior,
    LogNormalEncoder,
    PointEncoder,
)
from .factors import CodeCoupling, ContractivePenalty, jacobian_norm
from .graphs import CannotCompile
from .hashing import NoisySigmoidEncoder, ProbitEncoder, ThresholdEncoder
from .latent import Walk, interpolate, traverse
from .likelihood import (
    Comparison,
    LikelihoodWarning,
    LogLikelihood,
    compare,
    log_likelihood,
)
from .manifold import Geodesic, geodesic, pullback_metric
from .metrics import dead_features, feature_density, fraction_of_variance_unexplained, l0_norm
from .monitoring import active_units
from .networks import MLP, ConvNet, DeconvNet, TransposedMLP, UnitNormLinear
from .objectives import ELBO, IWAE, LinearWarmup, Walkback
from .part import Part
from .parzen import ParzenScore, ParzenWarning, parzen_log_likelihood
from .presets import (
    PPCA,
    VAE,
    ContractiveAutoencoder,
    DenoisingAutoencoder,
    DenoisingVAE,
    PredictiveSparseDecomposition,
    SemanticHashing,
    SparseAutoencoder,
    UndercompleteAutoencoder,
)
from .pretraining import pretrain
from .priors import (
    BernoulliPrior,
    CategoricalPrior,
    ExponentialPrior,
    FlatPrior,
    FlowPrior,
    GaussianMixturePrior,
    LaplacePrior,
    SpikeAndSlabPrior,
    StandardNormalPrior,
    StudentTPrior,
    SubsetPrior,
    VampPrior,
)
from .proposals import fit_proposal
from .ranking import (
    RetrievalScore,
    mean_average_precision,
    precision_at_k,
    recall_at_k,
)
from .rendering import render, trace_shapes
from .retrieval import binary_codes, hamming_distance, pack_codes, unpack_codes
from .sampling import Samples, denoise, reconstruct, sample, score
from .saving import load, save
from .sparse import ConditionalBernoulli, SpikeAndSlab
from .sparse_coding import (
    SparseCodes,
    SparseCodingEncoder,
    coupling_log_normalizer,
    lasso,
    sparse_coding_energy,
)
from .sparse_encoders import (
    ConditionalBernoulliEncoder,
    JumpReLUEncoder,
    NoisyGateEncoder,
    SpikeAndSlabEncoder,
    TopKEncoder,
)
from .tangents import IntrinsicDimension, TangentBasis, intrinsic_dimension, tangent_basis
from .training import Run, fit

if TYPE_CHECKING:
    from .estimator import AutoencoderEstimator

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "GAN",
    "IWAE",
    "LIKELIHOODS",
    "MLP",
    "PPCA",
    "VAE",
    "AdversarialAutoencoder",
    "AdversarialELBO",
    "AdversarialRun",
    "AdversarialVariationalBayes",
    "AnnealedSamples",
    "Annealing",
    "Autoencoder",
    "AutoencoderEstimator",
    "Ball",
    "BernoulliDecoder",
    "BernoulliEncoder",
    "BernoulliPrior",
    "BitFlip",
    "CalibrationRanks",
    "CannotCompile",
    "CategoricalDecoder",
    "CategoricalEncoder",
    "CategoricalPrior",
    "Chain",
    "CodeCoupling",
    "CodeIndex",
    "Comparison",
    "ConditionalBernoulli",
    "ConditionalBernoulliEncoder",
    "ContinuousBernoulli",
    "ContinuousBernoulliDecoder",
    "ContractiveAutoencoder",
    "ContractivePenalty",
    "ConvNet",
    "CorruptedDecoder",
    "Corruption",
    "Coverage",
    "Decoder",
    "DeconvNet",
    "DenoisingAutoencoder",
    "DenoisingVAE",
    "DiscretizedLogistic",
    "DiscretizedLogisticDecoder",
    "Discriminator",
    "EmbeddingComparison",
    "EmbeddingScore",
    "ExponentialPrior",
    "FlatPrior",
    "FlowPrior",
    "GaussianDecoder",
    "GaussianEncoder",
    "GaussianMixturePrior",
    "GaussianNoise",
    "Geodesic",
    "GreyBernoulli",
    "HeteroscedasticGaussianDecoder",
    "ImplicitEncoder",
    "IntrinsicDimension",
    "JumpReLUEncoder",
    "Kind",
    "LangevinChain",
    "LaplaceEncoder",
    "LaplacePrior",
    "LikelihoodWarning",
    "LinearGaussianPosterior",
    "LinearWarmup",
    "LogLikelihood",
    "LogNormalEncoder",
    "Masking",
    "Neighbours",
    "NoEncoder",
    "NoisyGateEncoder",
    "NoisySigmoidEncoder",
    "Part",
    "ParzenScore",
    "ParzenWarning",
    "PointEncoder",
    "PoissonDecoder",
    "PoissonThinning",
    "PosteriorSamples",
    "PredictiveSparseDecomposition",
    "ProbitEncoder",
    "RetrievalScore",
    "Run",
    "SaltAndPepper",
    "Samples",
    "Sandwich",
    "SemanticHashing",
    "SparseAutoencoder",
    "SparseCodes",
    "SparseCodingEncoder",
    "SpikeAndSlab",
    "SpikeAndSlabEncoder",
    "SpikeAndSlabPrior",
    "StandardNormalPrior",
    "StudentTPrior",
    "SubsetPrior",
    "TangentBasis",
    "ThresholdEncoder",
    "TopKEncoder",
    "TransposedMLP",
    "UndercompleteAutoencoder",
    "UnitNormLinear",
    "VampPrior",
    "Walk",
    "Walkback",
    "active_units",
    "adversarial_elbo",
    "annealed_denoising",
    "as_tensor",
    "bdmc",
    "binarize",
    "binary_codes",
    "compare",
    "compare_embeddings",
    "coupling_log_normalizer",
    "dead_features",
    "denoise",
    "dequantize",
    "expected_coverage",
    "feature_density",
    "fit",
    "fit_adversarial",
    "fit_proposal",
    "fraction_of_variance_unexplained",
    "geodesic",
    "gsn_chain",
    "hamming_distance",
    "interpolate",
    "intrinsic_dimension",
    "jacobian_norm",
    "l0_norm",
    "langevin",
    "lasso",
    "load",
    "load_dataset",
    "log_likelihood",
    "mean_average_precision",
    "pack_codes",
    "parzen_log_likelihood",
    "posterior_samples",
    "precision_at_k",
    "pretrain",
    "pullback_metric",
    "recall_at_k",
    "reconstruct",
    "render",
    "sample",
    "save",
    "score",
    "shared_log_likelihood",
    "simulation_based_calibration",
    "sparse_coding_energy",
    "stack_missing",
    "tangent_basis",
    "to_arviz",
    "trace_shapes",
    "traverse",
    "unpack_codes",
]


def __getattr__(name: str) -> object:
    if name == "AutoencoderEstimator":  # scikit-learn would add a half to the time of the import
        from .estimator import AutoencoderEstimator

        return AutoencoderEstimator
    if name == "plots":  # so would matplotlib
        return import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
