"""Probabilistic autoencoders as Pyro guide/model pairs."""

from .autoencoder import Autoencoder, Kind
from .corruptions import BitFlip, GaussianNoise
from .datasets import as_tensor, binarize, dequantize, load_dataset
from .decoders import (
    LIKELIHOODS,
    BernoulliDecoder,
    CategoricalDecoder,
    ContinuousBernoulliDecoder,
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
    LinearGaussianPosterior,
    PointEncoder,
)
from .factors import CodeCoupling, ContractivePenalty, jacobian_norm
from .likelihood import LogLikelihood, log_likelihood
from .monitoring import active_units
from .networks import MLP, ConvNet, DeconvNet, TransposedMLP, UnitNormLinear
from .objectives import ELBO, IWAE, LinearWarmup
from .part import Part
from .presets import PPCA, VAE, UndercompleteAutoencoder
from .priors import (
    BernoulliPrior,
    CategoricalPrior,
    FlatPrior,
    FlowPrior,
    GaussianMixturePrior,
    LaplacePrior,
    StandardNormalPrior,
    VampPrior,
)
from .sampling import Samples, reconstruct, sample
from .saving import load, save
from .sparse_coding import (
    SparseCodes,
    SparseCodingEncoder,
    coupling_log_normalizer,
    lasso,
    sparse_coding_energy,
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
    "Autoencoder",
    "BernoulliDecoder",
    "BernoulliEncoder",
    "BernoulliPrior",
    "BitFlip",
    "CategoricalDecoder",
    "CategoricalEncoder",
    "CategoricalPrior",
    "CodeCoupling",
    "ContinuousBernoulli",
    "ContinuousBernoulliDecoder",
    "ContractivePenalty",
    "ConvNet",
    "Decoder",
    "DeconvNet",
    "DiscretizedLogistic",
    "DiscretizedLogisticDecoder",
    "FlatPrior",
    "FlowPrior",
    "GaussianDecoder",
    "GaussianEncoder",
    "GaussianMixturePrior",
    "GaussianNoise",
    "GreyBernoulli",
    "HeteroscedasticGaussianDecoder",
    "Kind",
    "LaplacePrior",
    "LinearGaussianPosterior",
    "LinearWarmup",
    "LogLikelihood",
    "Part",
    "PointEncoder",
    "PoissonDecoder",
    "Run",
    "Samples",
    "SparseCodes",
    "SparseCodingEncoder",
    "StandardNormalPrior",
    "TransposedMLP",
    "UndercompleteAutoencoder",
    "UnitNormLinear",
    "VampPrior",
    "active_units",
    "as_tensor",
    "binarize",
    "coupling_log_normalizer",
    "dequantize",
    "fit",
    "jacobian_norm",
    "lasso",
    "load",
    "load_dataset",
    "log_likelihood",
    "reconstruct",
    "sample",
    "save",
    "sparse_coding_energy",
]
