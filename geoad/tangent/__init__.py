"""Tangent kernels of networks, and what is made of them: spectra, kernel PCA, regression, evolution during training."""

from geoad.tangent.estimates import Estimate as Estimate
from geoad.tangent.estimates import alignment as alignment
from geoad.tangent.estimates import centred as centred
from geoad.tangent.estimates import effective_rank as effective_rank
from geoad.tangent.estimates import frobenius as frobenius
from geoad.tangent.estimates import trace as trace
from geoad.tangent.evolution import Evolution as Evolution
from geoad.tangent.evolution import Snapshot as Snapshot
from geoad.tangent.kernel import TangentKernel as TangentKernel
from geoad.tangent.kernel import ntk as ntk
from geoad.tangent.regression import KernelMachine as KernelMachine
from geoad.tangent.regression import kernel_ridge as kernel_ridge
from geoad.tangent.regression import one_hot as one_hot
from geoad.tangent.spectra import KernelPCA as KernelPCA
from geoad.tangent.spectra import kernel_pca as kernel_pca
from geoad.tangent.spectra import spectrum as spectrum
