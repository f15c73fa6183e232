"""Transposed convolution for JAX with PyTorch's meaning, on CUDA and CPU kernels of its own."""

import pkgutil

# Run from a checkout, Python may find this folder first; the compiled modules are then those of the
# installed jaxconv (whose version must be the same: see jaxconv.ffi).
__path__ = pkgutil.extend_path(__path__, __name__)

from jaxconv import spatial
from jaxconv.api import (
    conv_transpose,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from jaxconv.ffi import EXPORT_DISABLED_CHECKS
from jaxconv.version import __version__

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "__version__",
    "conv_transpose",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "spatial",
]
