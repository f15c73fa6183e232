"""The three operations in jax.lax alone: what runs where no kernel of jaxconv's own does."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv.spec import ConvSpec, Role, channel_axis, result_shape, widest


def _dimension_numbers(spec: ConvSpec) -> tuple[str, str, str]:
    letters = "DHW"[3 - spec.rank :]
    data = f"N{letters}C" if spec.channels_last else f"NC{letters}"
    return data, f"OI{letters}", data


def _forward(x: jax.Array, w: jax.Array, spec: ConvSpec) -> jax.Array:
    """One problem: y = conv(dilate(x, s), flip(w)), on the padding that gives out_size.

    lax wants the weight as (co, ci // g, *k), ours is (ci, co // g, *k) with ci grouped.
    """
    batch = x.shape[: x.ndim - 1 - spec.rank]
    ci, cog = w.shape[:2]
    w = w.reshape(spec.groups, ci // spec.groups, cog, *spec.kernel_size).swapaxes(1, 2)
    w = w.reshape(spec.groups * cog, ci // spec.groups, *spec.kernel_size)
    y = lax.conv_general_dilated(
        x.reshape(math.prod(batch), *x.shape[len(batch) :]),
        jnp.flip(w, range(2, w.ndim)),
        window_strides=(1,) * spec.rank,
        padding=spec.lax_padding(),
        lhs_dilation=spec.stride,
        rhs_dilation=spec.dilation,
        dimension_numbers=_dimension_numbers(spec),
        feature_group_count=spec.groups,
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )
    return y.reshape(*batch, *y.shape[1:])


def _one(result: Role, a: jax.Array, b: jax.Array, spec: ConvSpec) -> jax.Array:
    """One problem: y is computed, x and w are its transposes."""
    if result == "y":
        return _forward(a, b, spec)
    dtype = jnp.dtype(spec.out_dtype) if spec.out_dtype is not None else a.dtype
    wide = widest(a.dtype, dtype)
    spec = spec.replace(out_dtype=None)
    a, b = a.astype(wide), b.astype(wide)
    shape = jax.ShapeDtypeStruct(result_shape(result, a.shape, b.shape, spec), wide)
    if result == "x":
        transposed = jax.linear_transpose(lambda x: _forward(x, b, spec), shape)
        return transposed(a)[0].astype(dtype)
    transposed = jax.linear_transpose(lambda w: _forward(a, w, spec), shape)
    return transposed(b)[0].astype(dtype)


def operation(result: Role, spec: ConvSpec) -> Callable[..., jax.Array]:
    """The operation that computes `result` ("y", "x" or "w") from the other two; see ConvSpec.

    The forward also takes a bias (*stack, co).
    """
    unstacked = spec.replace(stack=0)

    def one(a: jax.Array, b: jax.Array, *bias: jax.Array) -> jax.Array:
        out = _one(result, a, b, unstacked)
        for v in bias:
            others = [i for i in range(out.ndim) if i != channel_axis(out.shape, spec)]
            out = out + jnp.broadcast_to(jnp.expand_dims(v, others), out.shape)
        return out

    def run(*operands: jax.Array) -> jax.Array:
        def level(depth: int) -> Callable[..., jax.Array]:
            if depth == spec.stack:
                return one
            inner = level(depth + 1)

            def mapped(*arrays: jax.Array) -> jax.Array:
                # An operand of size 1 along the stack axis is shared, unless all are of size 1.
                stacked = [v.shape[0] != 1 for v in arrays]
                if not any(stacked):
                    return inner(*(v[0] for v in arrays))[None]
                axes: Any = tuple(0 if s else None for s in stacked)
                shared = (v if s else v[0] for v, s in zip(arrays, stacked, strict=True))
                return jax.vmap(inner, in_axes=axes)(*shared)

            return mapped

        return level(0)(*operands)

    return run
