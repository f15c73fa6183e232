"""Three bilinear primitives and one table of rules.

They are the partial derivatives of one trilinear form T(x, w, y) (see ConvSpec) by y, x and w:

    forward       y = dT/dy, from (x, w)
    input grad    x = dT/dx, from (y, w)
    weight grad   w = dT/dw, from (x, y)

Each is linear in both operands, and its transpose by one of them is the derivative of T by that
operand, taken at the other operand and the cotangent: one of the three again. So the family is
closed, and one rule gives every derivative of every order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxconv import ffi, partition, reference
from jaxconv.spec import ConvSpec, Role, channel_axis, result_shape, widest

Dims = Sequence[int | None]

# What each operation reads, in order; its name is what it computes.
OPERANDS: dict[Role, tuple[Role, Role]] = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}

_PRIMITIVES: dict[Role, Primitive] = {
    role: Primitive(f"jaxconv_{name}") for role, name in ffi.PASS_NAME.items()
}
# The forward with a bias, y = T(x, w) + b: linear in (x, b) and in (w, b), so it has rules of its
# own, and they lead to the three above.
_FORWARD_BIAS = Primitive("jaxconv_forward_bias")
# Where XLA is to find out how arrays are divided, lowering needs to know the devices, and jax then
# refuses to lower without any (for an AbstractMesh). Where types say all of it, under explicit
# sharding and inside shard_map, these twins are bound, which can be lowered for any devices.
_SETTLED = {p: Primitive(p.name) for p in (*_PRIMITIVES.values(), _FORWARD_BIAS)}


def _bind(primitive: Primitive, *operands: Any, spec: ConvSpec) -> jax.Array:
    meshes = [jax.typeof(v).sharding.mesh for v in operands]
    if any(not mesh.empty for mesh in meshes):
        operands = vary_together(*operands)
        if not any(mesh.auto_axes for mesh in meshes):
            primitive = _SETTLED[primitive]
    return primitive.bind(*operands, spec=spec)


def forward(x: jax.Array, w: jax.Array, bias: jax.Array | None, spec: ConvSpec) -> jax.Array:
    """y (*stack, *batch, co, *o) from x, w and a bias (*stack, co) of y's dtype."""
    if bias is None:
        return _bind(_PRIMITIVES["y"], x, w, spec=spec)
    return _bind(_FORWARD_BIAS, x, w, bias, spec=spec)


def input_grad(y: jax.Array, w: jax.Array, spec: ConvSpec) -> jax.Array:
    """x (*stack, *batch, ci, *i) from y, such as the cotangent of a forward's result, and w."""
    return _bind(_PRIMITIVES["x"], y, w, spec=spec)


def weight_grad(x: jax.Array, y: jax.Array, spec: ConvSpec) -> jax.Array:
    """w (*stack, ci, co // g, *k) from x and y; the sum runs over the batch."""
    return _bind(_PRIMITIVES["w"], x, y, spec=spec)


# ---------------------------------------------------------------------------------------------
# Types


def _abstract(result: Role, a: Any, b: Any, *bias: Any, spec: ConvSpec) -> ShapedArray:
    if a.dtype != b.dtype:
        raise TypeError(f"jaxconv {ffi.PASS_NAME[result]}: dtypes {a.dtype} and {b.dtype} differ")
    dtype = a.dtype if spec.out_dtype is None else spec.out_dtype
    shape = result_shape(result, a.shape, b.shape, spec)
    operands = (a, b, *bias)
    typed = [v for v in operands if not v.sharding.mesh.empty]
    meshes = {v.sharding.mesh for v in typed}
    if len(meshes) > 1 and any(mesh.explicit_axes for mesh in meshes):
        raise TypeError(f"jaxconv {ffi.PASS_NAME[result]}: operands of different meshes: {meshes}")
    if len(meshes) != 1:
        return ShapedArray(shape, dtype)
    # The result is divided as the operands are (under explicit sharding), and inside shard_map it
    # varies along the mesh axes along which they do (all along the same ones: see vary_together).
    division = _explicit_division(result, operands, shape, spec)
    sharding = typed[0].sharding.update(spec=division.spec(-1))
    return ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=typed[0].manual_axis_type)


def _roles(result: Role, operands: int) -> tuple[str, ...]:
    return (*OPERANDS[result], "bias")[:operands]


def _explicit_division(
    result: Role, avals: Sequence[Any], shape: Sequence[Any], spec: ConvSpec
) -> partition.Division:
    roles = _roles(result, len(avals))
    return partition.explicit(result, roles, avals, shape, spec, ffi.PASS_NAME[result])


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside shard_map: casts arrays to vary along every mesh axis along which one of them does, so
    that the gradient of one that does not (a replicated weight) is summed over those axes."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*varying)
    return tuple(
        lax.pcast(a, tuple(sorted(union - v)), to="varying") if union - v else a
        for a, v in zip(arrays, varying, strict=True)
    )


# ---------------------------------------------------------------------------------------------
# Derivatives


def _derive(result: Role, arrays: dict[Role, Any], spec: ConvSpec, dtype: np.dtype) -> jax.Array:
    """dT/d(result) in `dtype`, at the two other arrays.

    With preferred_element_type a cotangent is wider than the other operand; both are then taken in
    the wider type, and the result is rounded to `dtype` at the end.
    """
    a, b = (arrays[role] for role in OPERANDS[result])
    wide = widest(a.dtype, b.dtype)
    a, b = (lax.convert_element_type(v, wide) for v in (a, b))
    out_dtype = dtype if dtype.itemsize > wide.itemsize else None
    out = _bind(_PRIMITIVES[result], a, b, spec=spec.replace(out_dtype=out_dtype))
    return lax.convert_element_type(out, dtype)


def _sum_to(value: jax.Array, shape: Sequence[Any], spec: ConvSpec) -> jax.Array:
    """Sums over the stack axes along which an operand of `shape` was shared."""
    shared = [i for i in range(spec.stack) if shape[i] == 1 and value.shape[i] != 1]
    return value.sum(shared, keepdims=True) if shared else value


def _transpose(result: Role, by: int, cotangent: Any, *operands: Any, spec: ConvSpec) -> jax.Array:
    """The transpose by operand number `by`, of which only the type is known."""
    role, other = OPERANDS[result][by], OPERANDS[result][1 - by]
    aval = operands[by].aval
    out = _derive(role, {result: cotangent, other: operands[1 - by]}, spec, aval.dtype)
    return partition.like(_sum_to(out, aval.shape, spec), aval)


def _bias_axes(ndim: int, spec: ConvSpec) -> list[int]:
    """The axes of y that a bias has: the stack and the channels."""
    return [*range(spec.stack), channel_axis(range(ndim), spec)]


def _spread_bias(bias: Any, y: Any, spec: ConvSpec) -> jax.Array:
    """A bias (*stack, co) as an array of y's type."""
    sharding = None if y.sharding.mesh.empty else y.sharding
    axes = _bias_axes(y.ndim, spec)
    return lax.broadcast_in_dim(bias, y.shape, axes, out_sharding=sharding)


def _sum_bias(y: Any, spec: ConvSpec) -> jax.Array:
    """The transpose of _spread_bias."""
    kept = _bias_axes(y.ndim, spec)
    return y.sum([i for i in range(y.ndim) if i not in kept])


def _bias_tangent(tangent: Any, x: Any, w: Any, bias: Any, *, spec: ConvSpec) -> jax.Array:
    y = _abstract("y", *(jax.typeof(v) for v in (x, w, bias)), spec=spec)
    return _spread_bias(tangent, y, spec)


def _transpose_bias(cotangent: Any, *operands: Any, spec: ConvSpec) -> list[Any]:
    """Cotangents of those of x, w and the bias in which the forward is linear."""
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(o.aval) if ad.is_undefined_primal(o) else None for o in operands]
    bias = operands[2]
    if not ad.is_undefined_primal(bias):
        raise ValueError("jaxconv: a forward with a constant bias is affine: it has no transpose")
    cotangents: list[Any] = [
        _transpose("y", by, cotangent, *operands[:2], spec=spec)
        if ad.is_undefined_primal(operands[by])
        else None
        for by in (0, 1)
    ]
    summed = _sum_to(_sum_bias(cotangent, spec), bias.aval.shape, spec)
    return [*cotangents, partition.like(summed, bias.aval)]


# ---------------------------------------------------------------------------------------------
# vmap


def _batch(
    primitive: Primitive, result: Role, operands: Sequence[Any], dims: Dims, *, spec: ConvSpec
) -> tuple[Any, int]:
    """A mapped x or y alone joins the batch, after the stack. A mapped bias alone is added to one
    result. Anything else stacks problems: operands that are not mapped get an axis of size 1, along
    which they are shared."""
    if result != "w" and dims[0] is not None and all(d is None for d in dims[1:]):
        first, *rest = operands
        moved = jnp.moveaxis(first, dims[0], spec.stack)
        return primitive.bind(moved, *rest, spec=spec), spec.stack
    if len(operands) == 3 and dims[0] is None and dims[1] is None:
        y = _bind(_PRIMITIVES["y"], *operands[:2], spec=spec)
        return jax.vmap(lambda b: y + _spread_bias(b, jax.typeof(y), spec), dims[2])(operands[2]), 0
    stacked = [
        jnp.expand_dims(o, 0) if d is None else jnp.moveaxis(o, d, 0)
        for o, d in zip(operands, dims, strict=True)
    ]
    return primitive.bind(*stacked, spec=spec.replace(stack=spec.stack + 1)), 0


# ---------------------------------------------------------------------------------------------
# Lowering


def _divided(
    primitive: Primitive, result: Role, ctx: Any, spec: ConvSpec
) -> Callable[..., jax.Array] | None:
    """The operation divided over devices, as a function whose parts are the operation again; None
    where there is nothing to divide: on one device, and inside shard_map."""
    context = ctx.module_context.axis_context
    if getattr(context, "num_devices", 1) == 1:
        return None
    (out,) = ctx.avals_out
    mesh = out.sharding.mesh
    if mesh.explicit_axes:
        division = _explicit_division(result, ctx.avals_in, out.shape, spec)
        if division.axes:
            return partition.lower_explicit(division, mesh, primitive.bind, spec)
        if not mesh.auto_axes:
            return None
    if context.device_assignment is None:  # see partition.require_devices
        return None
    roles = (*_roles(result, len(ctx.avals_in)), result)
    shapes = [a.shape for a in (*ctx.avals_in, out)]
    return partition.lower_auto(partition.factor(result, roles, shapes, spec), primitive.bind, spec)


def _lower(
    platform: str | None,
    primitive: Primitive,
    result: Role,
    ctx: Any,
    *operands: Any,
    spec: ConvSpec,
) -> Any:
    """Calls the platform's kernel, or, where it has none for the problem, lowers jax.lax."""

    def lower(fun: Callable[..., Any]) -> Any:
        return mlir.lower_fun(fun, multiple_results=False)(ctx, *operands)

    divided = _divided(primitive, result, ctx, spec)
    if divided is not None:
        ctx = partition.with_mesh(ctx)
        values = lower(divided)
        partition.say_what(values, f"{primitive} {spec}")
        return values
    forced, (out,) = spec.implementation, ctx.avals_out
    if forced == "xla":
        return lower(reference.operation(result, spec))
    if platform is None:
        why = "jaxconv has no kernels for this platform"
    elif forced in ffi.PLATFORM_IMPLEMENTATIONS and forced != platform:
        why = f"this is being lowered for {platform}"
    else:
        why = ffi.refusal(platform, [a.dtype for a in ctx.avals_in[:2]], out.dtype, spec)
    if why is None:
        assert platform is not None
        first, second = OPERANDS[result]
        arrays = {first: ctx.avals_in[0], second: ctx.avals_in[1], result: out}
        bias = len(operands) == 3
        kernel, workspace = ffi.choose(platform, result, out=out, bias=bias, spec=spec, **arrays)
        if kernel == "xla":
            return lower(reference.operation(result, spec))
        return lower(ffi.call(result, out, spec, kernel, workspace))
    if forced is not None:
        raise ValueError(
            f"jaxconv: implementation={forced!r} cannot run the {ffi.PASS_NAME[result]}: {why}"
        )
    return lower(reference.operation(result, spec))


# ---------------------------------------------------------------------------------------------
# The table: every primitive, and every rule of each.


def _register(primitive: Primitive, result: Role, settled: bool) -> None:
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(_abstract, result))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive, result)
    if not settled:
        partition.require_devices(primitive)
    mlir.register_lowering(primitive, functools.partial(_lower, None, primitive, result))
    for platform in ffi.built_platforms():
        mlir.register_lowering(
            primitive, functools.partial(_lower, platform, primitive, result), platform=platform
        )


for _role, _original in _PRIMITIVES.items():
    for _primitive in (_original, _SETTLED[_original]):
        _register(_primitive, _role, settled=_primitive is not _original)
        ad.defbilinear(
            _primitive,
            functools.partial(_transpose, _role, 0),
            functools.partial(_transpose, _role, 1),
        )

for _primitive in (_FORWARD_BIAS, _SETTLED[_FORWARD_BIAS]):
    _register(_primitive, "y", settled=_primitive is not _FORWARD_BIAS)
    ad.defjvp(
        _primitive,
        lambda t, x, w, bias, *, spec: _bind(_PRIMITIVES["y"], t, w, spec=spec),
        lambda t, x, w, bias, *, spec: _bind(_PRIMITIVES["y"], x, t, spec=spec),
        _bias_tangent,
    )
    ad.primitive_transposes[_primitive] = _transpose_bias
