"""Probabilistic autoencoders as Pyro guide/model pairs."""

from .annealing import Annealing, Sandwich, bdmc
from .autoencoder import Autoencoder, Kind
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
from .distributions import ContinuousBernoulli, DiscretizedLogistic, GreyBernoulli
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
from .hashing import NoisySigmoidEncoder, ProbitEncoder, ThresholdEncoder
from .likelihood import Comparison, LogLikelihood, compare, log_likelihood
from .metrics import dead_features, feature_density, fraction_of_variance_unexplained, l0_norm
from .monitoring import active_units
from .networks import MLP, ConvNet, DeconvNet, TransposedMLP, UnitNormLinear
from .objectives import ELBO, IWAE, LinearWarmup
from .part import Part
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
from .training import Run, fit

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "LIKELIHOODS",
    "MLP",
    "PPCA",
    "VAE",
    "Annealing",
    "Autoencoder",
    "BernoulliDecoder",
    "BernoulliEncoder",
    "BernoulliPrior",
    "BitFlip",
    "CategoricalDecoder",
    "CategoricalEncoder",
    "CategoricalPrior",
    "CodeCoupling",
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
    "Decoder",
    "DeconvNet",
    "DenoisingAutoencoder",
    "DenoisingVAE",
    "DiscretizedLogistic",
    "DiscretizedLogisticDecoder",
    "ExponentialPrior",
    "FlatPrior",
    "FlowPrior",
    "GaussianDecoder",
    "GaussianEncoder",
    "GaussianMixturePrior",
    "GaussianNoise",
    "GreyBernoulli",
    "HeteroscedasticGaussianDecoder",
    "JumpReLUEncoder",
    "Kind",
    "LaplaceEncoder",
    "LaplacePrior",
    "LinearGaussianPosterior",
    "LinearWarmup",
    "LogLikelihood",
    "LogNormalEncoder",
    "Masking",
    "NoisyGateEncoder",
    "NoisySigmoidEncoder",
    "Part",
    "PointEncoder",
    "PoissonDecoder",
    "PoissonThinning",
    "PredictiveSparseDecomposition",
    "ProbitEncoder",
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
    "ThresholdEncoder",
    "TopKEncoder",
    "TransposedMLP",
    "UndercompleteAutoencoder",
    "UnitNormLinear",
    "VampPrior",
    "active_units",
    "as_tensor",
    "bdmc",
    "binarize",
    "binary_codes",
    "compare",
    "coupling_log_normalizer",
    "dead_features",
    "denoise",
    "dequantize",
    "feature_density",
    "fit",
    "fit_proposal",
    "fraction_of_variance_unexplained",
    "hamming_distance",
    "jacobian_norm",
    "l0_norm",
    "lasso",
    "load",
    "load_dataset",
    "log_likelihood",
    "pack_codes",
    "pretrain",
    "reconstruct",
    "sample",
    "save",
    "score",
    "sparse_coding_energy",
    "stack_missing",
    "unpack_codes",
]
