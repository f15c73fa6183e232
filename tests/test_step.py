"""What a training step compiles to besides the kernels: nothing that costs time or memory."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxconv
from workloads import select

# A grouped layer whose y is large against its weight, as volumes are.
(LAYER,) = select(["unet3d_g8_k3s2"])
layouts = pytest.mark.parametrize("layout", ["channels_first", "channels_last"])


def shapes(layout: str) -> list[jax.ShapeDtypeStruct]:
    """Of x, w, the bias, and the cotangent of y."""
    last = layout == "channels_last"
    of = [LAYER.shape("x", last), LAYER.shape("w"), (LAYER.co,), LAYER.shape("y", last)]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in of]


def step(layout: str, x: Any, w: Any, bias: Any, cotangent: Any) -> Any:
    layer = functools.partial(jaxconv.conv_transpose3d, **LAYER.arguments(), data_format=layout)
    y, vjp = jax.vjp(layer, x, w, bias)
    return y, *vjp(cotangent)


@layouts
def test_a_step_copies_nothing(platform, layout):
    compiled = jax.jit(functools.partial(step, layout)).lower(*shapes(layout)).compile()
    text = compiled.as_text()
    assert text is not None
    assert len(re.findall(r"custom_call_target=\"jaxconv_\w+\"", text)) == 3
    # Operations by name; metadata speaks of transposes too, so only what follows a type counts.
    found = set(re.findall(r"= \S+ ([\w-]+)\(", text))
    assert not found & {"transpose", "copy", "copy-start", "convolution", "pad", "concatenate"}


@layouts
def test_memory_of_a_step(platform, layout):
    """Operands and results, and a workspace of at most a tenth of y beside a packed weight."""
    compiled = jax.jit(functools.partial(step, layout)).lower(*shapes(layout)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    _, w, _, y = (4 * shape.size for shape in shapes(layout))
    # Packed weights are filled up to whole tiles of channels.
    assert memory.temp_size_in_bytes <= y / 10 + 8 * w


def test_a_hessian_vector_product_costs_three_steps(platform):
    """Forward over reverse: the step's three operations, and two more for each, one an operand."""
    x, w, _, _ = shapes("channels_first")

    def loss(x, w):
        return jnp.sin(jaxconv.conv_transpose3d(x, w, **LAYER.arguments())).sum()

    def product(x, w, *tangents):
        return jax.jvp(jax.grad(loss, (0, 1)), (x, w), tangents)[1]

    text = jax.jit(product).lower(x, w, x, w).compile().as_text()
    assert text is not None
    assert len(re.findall(r"custom_call_target=\"jaxconv_\w+\"", text)) <= 9
