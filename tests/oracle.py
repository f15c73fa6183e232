"""The operation by its definition, in float64 NumPy, and how far a kernel may be from it.

Nothing here shares code with jaxconv. Arrays are channels first; `pad` is the padding before each
axis, and output sizes are given, so that one canvas serves every kind of padding.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Definition:
    """T(x, w, y) = sum of x[n, ci, i] w[ci, co, t] y[n, co, i s - p + t d], and its derivatives."""

    in_size: Sequence[int]
    out_size: Sequence[int]
    kernel_size: Sequence[int]
    stride: Sequence[int]
    pad: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def _taps(self):
        """For each tap: its index, and the inputs and outputs it joins, as slices of every axis."""
        axes = []
        for i, o, k, s, p, d in zip(
            self.in_size,
            self.out_size,
            self.kernel_size,
            self.stride,
            self.pad,
            self.dilation,
            strict=True,
        ):
            taps = []
            for t in range(k):
                joined = [j for j in range(i) if 0 <= j * s - p + t * d < o]
                if joined:
                    first, last = joined[0], joined[-1]
                    source = slice(first, last + 1)
                    target = slice(first * s - p + t * d, last * s - p + t * d + 1, s)
                    taps.append((t, source, target))
            axes.append(taps)
        for combination in itertools.product(*axes):
            t, source, target = zip(*combination, strict=True)
            yield t, (..., *source), (..., *target)

    def _grouped(self, a: np.ndarray, axis: int) -> np.ndarray:
        shape = a.shape
        g = self.groups
        return a.reshape(*shape[:axis], g, shape[axis] // g, *shape[axis + 1 :]).astype(np.float64)

    def y(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        xg, wg = self._grouped(x, 1), self._grouped(w, 0)
        y = np.zeros((x.shape[0], self.groups, w.shape[1], *self.out_size))
        for t, source, target in self._taps():
            y[target] += np.einsum("ngc...,gco->ngo...", xg[source], wg[(..., *t)])
        return y.reshape(x.shape[0], self.groups * w.shape[1], *self.out_size)

    def x(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        yg, wg = self._grouped(y, 1), self._grouped(w, 0)
        x = np.zeros((y.shape[0], self.groups, wg.shape[1], *self.in_size))
        for t, source, target in self._taps():
            x[source] += np.einsum("ngo...,gco->ngc...", yg[target], wg[(..., *t)])
        return x.reshape(y.shape[0], w.shape[0], *self.in_size)

    def w(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        xg, yg = self._grouped(x, 1), self._grouped(y, 1)
        w = np.zeros((self.groups, xg.shape[2], yg.shape[2], *self.kernel_size))
        for t, source, target in self._taps():
            a, b = (
                v.reshape(*v.shape[:3], math.prod(v.shape[3:])) for v in (xg[source], yg[target])
            )
            w[(..., *t)] = np.einsum("ngcp,ngop->gco", a, b)
        return w.reshape(x.shape[1], yg.shape[2], *self.kernel_size)


# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TF32_ROUNDOFF = 2.0**-11
# Below this, results may be flushed to zero or are spaced evenly.
SMALLEST = {"float64": 0.0, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


def bound(
    operation: Callable[[np.ndarray, np.ndarray], np.ndarray],
    a: np.ndarray,
    b: np.ndarray,
    in_dtype: str,
    out_dtype: str,
    *,
    tf32: bool = False,
    added: np.ndarray | float = 0.0,
) -> np.ndarray:
    """How far, element by element, a right kernel may be from operation(a, b) + added.

    With m terms a*b whose sizes add up to S, and u the roundoff of the type they are added in
    (float32 for 16-bit types), products and sums are off by (4 sqrt(m) + 4) u S: sqrt(m) because
    roundings are independent, in whatever order they are added (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", 2019, https://doi.org/10.1137/18M1226312), with a
    constant that random data never come near. Rounding both operands to TF32 adds twice its
    roundoff of S, and rounding the result, that of its type.
    """
    terms = operation(np.ones_like(a, np.float64), np.ones_like(b, np.float64)) + 1
    sizes = operation(np.abs(a).astype(np.float64), np.abs(b).astype(np.float64)) + np.abs(added)
    value = np.abs(operation(a, b) + added)
    add_in = in_dtype if in_dtype == "float64" else "float32"
    error = (4 * np.sqrt(terms) + 4) * ROUNDOFF[add_in] * sizes
    if tf32:
        error = error + 2 * TF32_ROUNDOFF * sizes
    return error + ROUNDOFF[out_dtype] * (value + error) + SMALLEST[out_dtype]


def assert_within(actual: np.ndarray, wanted: np.ndarray, allowed: np.ndarray, what: str) -> None:
    """Fails with the worst element, both values, and the share that is right."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == wanted.shape, f"{what}: shape {actual.shape}, wanted {wanted.shape}"
    if actual.size == 0:
        return
    excess = np.where(np.isnan(actual), np.inf, np.abs(actual - wanted) - allowed)
    if (excess > 0).any():
        at = np.unravel_index(int(np.argmax(excess)), excess.shape)
        raise AssertionError(
            f"{what}: {100 * (excess <= 0).mean():.2f} % right; worst at "
            f"{tuple(int(i) for i in at)}: got {actual[at]}, wanted {wanted[at]} "
            f"+- {allowed[at]:.3g}"
        )
