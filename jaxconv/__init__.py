"""Transposed convolution for JAX with PyTorch's meaning, on CUDA and CPU kernels of its own."""

from jaxconv.api import conv_transpose, conv_transpose1d, conv_transpose2d, conv_transpose3d
from jaxconv.version import __version__

__all__ = [
    "__version__",
    "conv_transpose",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]
