"""The public functions against torch.nn.functional.conv_transpose1d, 2d and 3d on the CPU."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_results
from torch_results import STORED_CASES

import cases
import jaxconv
import oracle
from cases import Case

OPS = (jaxconv.conv_transpose1d, jaxconv.conv_transpose2d, jaxconv.conv_transpose3d)


def outcome(c: Case, dtype: str, channels_last: bool):
    """y and the gradients by x, w and bias for a cotangent, channels first."""
    x, w, ct, bias = (jnp.asarray(a, dtype) for a in c.arrays())

    def f(x, w, bias):
        if not channels_last:
            return OPS[c.rank - 1](x, w, bias, **c.arguments())
        y = OPS[c.rank - 1](
            cases.last(x, c.rank), w, bias, **c.arguments(), data_format="channels_last"
        )
        return cases.first(y, c.rank)

    y, vjp = jax.vjp(jax.jit(f), x, w, bias)
    dx, dw, db = vjp(ct)
    return {"y": y, "x": dx, "w": dw, "bias": db}


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("c", torch_results.available(), ids=lambda c: c.name)
def test_results_and_gradients(platform, c, dtype, channels_last):
    wanted, definition = torch_results.results(c), c.definition()
    arrays: dict[str, np.ndarray] = dict(zip(("x", "w", "y", "bias"), c.arrays(), strict=True))
    tf32 = platform == "cuda" and dtype == "float32"
    for name, actual in outcome(c, dtype, channels_last).items():
        if name == "bias":  # a sum of the cotangent: as a product with ones
            terms = np.prod(c.y_shape) / c.co
            sizes = np.abs(arrays["y"]).sum((0, *range(2, c.rank + 2)))
            allowed = (4 * np.sqrt(terms) + 4) * oracle.ROUNDOFF[dtype] * sizes
        else:
            a, b = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}[name]
            added = arrays["bias"].reshape(-1, *(1,) * c.rank) if name == "y" else 0.0
            allowed = oracle.bound(
                getattr(definition, name),
                arrays[a],
                arrays[b],
                dtype,
                dtype,
                tf32=tf32,
                added=added,
            )
            if dtype == "float32":  # the operands were rounded to float32 as well
                sizes = getattr(definition, name)(np.abs(arrays[a]), np.abs(arrays[b]))
                allowed = allowed + 2 * oracle.ROUNDOFF[dtype] * sizes
        stored = 0.0 if torch_results.installed() else oracle.ROUNDOFF["float32"]
        allowed = allowed + stored * np.abs(wanted[name])
        oracle.assert_within(np.asarray(actual), wanted[name], allowed, f"{name} of {c}")


def test_stored_results_are_complete():
    with np.load(torch_results.STORED) as stored:
        assert {key.split("/")[0] for key in stored} == {c.name for c in STORED_CASES}
    assert len(STORED_CASES) >= 15


@pytest.mark.skipif(not torch_results.installed(), reason="torch is not installed")
@pytest.mark.parametrize("c", STORED_CASES, ids=lambda c: c.name)
def test_stored_results_are_torch(c):
    with np.load(torch_results.STORED) as stored:
        for name, value in torch_results.compute(c).items():
            np.testing.assert_allclose(stored[f"{c.name}/{name}"], value, rtol=2e-7, atol=1e-12)


def test_torch_is_installed_where_it_is_asked_for():
    """pyproject.toml asks for torch below Python 3.12: there the comparison must be live."""
    if sys.version_info < (3, 12):
        assert importlib.util.find_spec("torch") is not None


@pytest.mark.parametrize("output_size", [(9, 11), (10, 12), (9, 12), (2, 6, 9, 11)])
def test_output_size(output_size):
    x, w = jnp.ones((2, 4, 5, 6)), jnp.ones((4, 3, 3, 3))
    y = jaxconv.conv_transpose2d(x, w, stride=2, padding=1, output_size=output_size, groups=2)
    assert y.shape == (2, 6, *output_size[-2:])
    padding = tuple(o - least for o, least in zip(output_size[-2:], (9, 11), strict=True))
    wanted = jaxconv.conv_transpose2d(x, w, stride=2, padding=1, output_padding=padding, groups=2)
    np.testing.assert_array_equal(y, wanted)
