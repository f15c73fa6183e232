"""Inputs divided along a spatial axis: the values of the whole, and only halos are sent.

Operands are small integers, whose sums are exact in whatever order: results must be equal.
"""

import dataclasses
import doctest
import functools
import math
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import cases
import jaxconv

OPS = {
    rank: (
        getattr(jaxconv, f"conv_transpose{rank}d"),
        getattr(jaxconv.spatial, f"conv_transpose{rank}d"),
    )
    for rank in (1, 2, 3)
}


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:devices]), ("z",))


def padded(a: np.ndarray, dim: int, size: int, value: float = 0.0) -> np.ndarray:
    pads = [(0, 0)] * a.ndim
    pads[dim] = (0, size - a.shape[dim])
    return np.pad(a, pads, constant_values=value)


def functions(c: cases.Case, devices: int, axis: int, last: bool, bias: bool, check_vma: bool):
    """The operation on the whole, and on parts, as functions of all operands that give the output
    and, from a cotangent of it, the gradients."""
    op, spatial_op = OPS[c.rank]
    arguments: dict[str, Any] = c.arguments()
    arguments["data_format"] = "channels_last" if last else "channels_first"
    dim = axis + (1 if last else 2)
    split = P(*[None] * dim, "z")
    divided = jax.shard_map(
        functools.partial(
            spatial_op, **arguments, axis_name="z", spatial_axis=axis, size=c.i[axis]
        ),
        mesh=mesh_of(devices),
        in_specs=(split, *[P()] * (1 + bias)),
        out_specs=split,
        check_vma=check_vma,
    )
    return functools.partial(op, **arguments), divided, dim


def compare(
    c: cases.Case,
    devices: int,
    axis: int,
    last: bool = False,
    bias: bool = True,
    check_vma: bool = True,
) -> Any:
    """Compares output and gradients; returns what was compiled for the parts."""
    rng = np.random.default_rng(0)
    shapes = (c.x_shape, c.w_shape, (c.co,), c.y_shape)
    x, w, b, y = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)
    if last:
        x, y = np.moveaxis(x, 1, -1), np.moveaxis(y, 1, -1)
    whole, divided, dim = functions(c, devices, axis, last, bias, check_vma)
    parameters = (w, b) if bias else (w,)

    def with_gradients(f):
        def run(y, *operands):
            out, back = jax.vjp(f, *operands)
            return out, back(y)

        return run

    # What pads the input beyond its size must not count.
    part = -(-c.i[axis] // devices)
    x_parts = padded(x, dim, part * devices, np.nan)
    y_parts_shape = jax.eval_shape(divided, x_parts, *parameters).shape
    y_parts = padded(y, dim, y_parts_shape[dim])
    compiled = jax.jit(with_gradients(divided)).lower(y_parts, x_parts, *parameters).compile()
    out, grads = jax.tree.map(np.asarray, compiled(y_parts, x_parts, *parameters))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted, wanted_grads = jax.tree.map(
            np.asarray, jax.jit(with_gradients(whole))(y, x, *parameters)
        )
    np.testing.assert_array_equal(out, padded(wanted, dim, out.shape[dim]))
    np.testing.assert_array_equal(grads[0], padded(wanted_grads[0], dim, part * devices))
    for got, want in zip(grads[1:], wanted_grads[1:], strict=True):
        np.testing.assert_array_equal(got, want)
    return compiled


# fmt: off
CASES = [
    # Twice as many outputs as inputs, as networks have them.
    (cases.case("k2s2", 1, 4, 4, 1, (8, 3), 2, 2), 4, 0),
    (cases.case("k3s2", 2, 4, 4, 2, (8, 3, 4), 3, 2, 1, 1), 4, 0),
    (cases.case("k4s2", 1, 4, 3, 1, (3, 16, 4), 4, 2, 1), 8, 1),
    (cases.case("k3s2_one_less", 1, 4, 4, 1, (8, 3), 3, 2, 1), 4, 0),
    (cases.case("depthwise", 1, 4, 4, 4, (5, 8), 5, 2, 2, 1), 4, 1),
    # More: windows of the input move from part to part.
    (cases.case("valid", 1, 2, 3, 1, (8, 3), 3, 2), 4, 0),
    (cases.case("valid_k7", 1, 2, 3, 1, (16,), 7, 1), 8, 0),
    (cases.case("dilated", 1, 2, 2, 1, (8, 4), 3, 3, 1, 2, 4), 4, 0),
    (cases.case("negative_padding", 1, 2, 2, 1, (8, 4), 3, 2, ((-9, -5), (0, 0))), 4, 0),
    # Halos from farther than the neighbour.
    (cases.case("wide_kernel", 1, 2, 2, 1, (8,), 15, 2, 7, 1), 8, 0),
    (cases.case("wide_dilation", 1, 2, 2, 1, (4, 3), 3, 1, 5, 0, 5), 4, 0),
    # Much is cut off.
    (cases.case("heavy_padding", 1, 2, 2, 1, (16,), 3, 2, ((9, 2),)), 4, 0),
    # The stride outreaches the kernel.
    (cases.case("empty_phases", 1, 2, 2, 1, (8, 3), 2, 5, 0, 4), 4, 0),
    # Parts that do not divide evenly, and devices with nothing to do.
    (cases.case("uneven", 1, 2, 3, 1, (13, 3), 3, 2, 1, 1), 4, 0),
    (cases.case("uneven_valid", 1, 2, 3, 1, (13,), 4, 3), 4, 0),
    (cases.case("few", 1, 2, 3, 1, (5,), 3, 2, 1, 1), 4, 0),
]
# fmt: on


@pytest.mark.parametrize(("c", "devices", "axis"), CASES, ids=[c.name for c, _, _ in CASES])
def test_values_and_collectives(c, devices, axis):
    text = compare(c, devices, axis).as_text()
    names = set(re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text))
    assert names <= {"collective-permute", "all-reduce"}, names
    # The weight's and the bias's gradients are all that is summed.
    summed = re.findall(r"= \(?f32\[([\d,]*)\][^=]* all-reduce\(", text)
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in summed]
    assert all(size <= math.prod(c.w_shape) for size in sizes)


def test_only_halos_are_sent():
    c = cases.case("", 1, 4, 4, 1, (32, 6, 6), 3, 2, 1, 1)
    text = compare(c, 4, 0, bias=False).as_text()
    sent = re.findall(r"= \(?f32\[([\d,]*)\][^=]* collective-permute(?:-start)?\(", text)
    # One plane in the forward, and one, its gradient, back.
    assert [math.prod(int(n) for n in shape.split(",")) for shape in sent] == [4 * 6 * 6] * 2
    c = cases.case("", 1, 4, 4, 1, (32, 6, 6), 2, 2)
    assert "collective-permute" not in compare(c, 4, 0).as_text()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_layouts_and_checks(last, check_vma):
    compare(cases.case("", 1, 4, 4, 2, (8, 3), 4, 2, 1), 4, 0, last=last, check_vma=check_vma)


@given(cases.cases(), st.sampled_from([2, 3, 4]))
def random_cases(c, devices):
    c = dataclasses.replace(c, i=c.i[:1], k=c.k[:1], s=c.s[:1], p=c.p[:1], op=c.op[:1], d=c.d[:1])
    if c.o[0] > 0:
        compare(c, devices, 0)


def test_random_cases():
    hypothesis.settings(max_examples=25)(random_cases)()


def test_bad_arguments():
    def call(**arguments):
        mapped = jax.shard_map(
            functools.partial(jaxconv.spatial.conv_transpose1d, axis_name="z", **arguments),
            mesh=mesh_of(4),
            in_specs=(P(None, None, "z"), P()),
            out_specs=P(None, None, "z"),
        )
        return mapped(jnp.ones((1, 1, 8)), jnp.ones((1, 1, 3)))

    with pytest.raises(ValueError, match="spatial_axis must be from 0 to 0, got 1"):
        call(spatial_axis=1)
    with pytest.raises(ValueError, match="at most what all parts have together, 8, got 9"):
        call(size=9)


def test_example():
    """That of the docstrings."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    names = [f"conv_transpose{rank}d" for rank in OPS]
    for name in names:
        for example in finder.find(getattr(jaxconv.spatial, name), name):
            runner.run(example)
    assert runner.summarize().attempted > 0
    assert runner.summarize().failed == 0
