"""PyTorch's results on the CPU for the problems of tests/cases.py: computed where torch is
installed, and stored in tests/torch_results.npz for where it is not.

    python tests/torch_results.py      # writes them anew, with the torch that is installed
"""

import importlib.util
import math
import pathlib
from typing import Any

import numpy as np

from cases import CASES, Case

STORED = pathlib.Path(__file__).with_name("torch_results.npz")

Results = dict[str, np.ndarray]  # y, x, w, bias: the result, and the gradients for cotangent y


def takes(c: Case) -> bool:
    """torch has neither asymmetric padding nor empty spatial axes nor channels."""
    return c.ci > 0 and min(c.o) > 0 and all(a == b >= 0 for a, b in c.p)


def small(c: Case) -> bool:
    """Few enough numbers to be stored: the file stays below a megabyte."""
    return sum(math.prod(s) for s in (c.x_shape, c.w_shape, c.y_shape)) < 40_000


TORCH_CASES = [c for c in CASES if takes(c)]
STORED_CASES = [c for c in TORCH_CASES if small(c)]


def available() -> list[Case]:
    return TORCH_CASES if installed() else STORED_CASES


def compute(c: Case) -> Results:
    import torch
    import torch.nn.functional as functional

    op: Any = getattr(functional, f"conv_transpose{c.rank}d")
    x, w, ct, bias = (torch.tensor(a, requires_grad=True) for a in c.arrays())
    y = op(x, w, bias, c.s, [a for a, _ in c.p], c.op, c.g, c.d)
    dx, dw, db = torch.autograd.grad(y, (x, w, bias), ct)
    named = {"y": y, "x": dx, "w": dw, "bias": db}
    return {name: value.detach().numpy() for name, value in named.items()}


def installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def results(c: Case) -> Results:
    if installed():
        return compute(c)
    with np.load(STORED) as stored:
        return {name: stored[f"{c.name}/{name}"] for name in ("y", "x", "w", "bias")}


if __name__ == "__main__":
    # float32 halves the file; its rounding is part of the tolerance of the comparison.
    arrays: dict[str, Any] = {
        f"{c.name}/{name}": value.astype(np.float32)
        for c in STORED_CASES
        for name, value in compute(c).items()
    }
    np.savez_compressed(STORED, **arrays)
