"""How long XLA's own convolutions take on a GPU, where no kernel but "direct" takes a problem."""

import math

import numpy as np

from jaxconv.spec import ConvSpec, Role


def seconds(result: Role, x: tuple[int, ...], w: tuple[int, ...], dtype: str, spec: ConvSpec):
    """An estimate for one problem of the stack; infinity where XLA was never measured to be ahead.

    What is left to "direct" has few input channels, or few output channels and more terms than
    "thin" keeps, or wants full precision. On an H200, transposed convolutions of one or few
    channels on one side ran at 3 to 12 TFLOP/s in XLA (64 to 1 channels, k 3 and 4, 3D), whatever
    the floating type of up to 32 bits. Their weight gradients took it 41 ms and more, grouped
    forwards 9 to 100 times as long as ours.
    """
    if result == "w" or spec.groups > 1 or np.dtype(dtype).itemsize > 4:
        return math.inf
    flop = 2 * math.prod(x[spec.stack :]) * math.prod(w[spec.stack + 1 :])
    return 15e-6 + flop / 5e12
