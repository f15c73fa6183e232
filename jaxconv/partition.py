"""How one of the three operations is divided over the devices of a mesh.

Every dimension of every array is a product of factors, named here once:

    x  stack, batch, g * c, *spatial        w  stack, g * c, o, *kernel
    y  stack, batch, g * o, *spatial        bias  stack, g * o

with g the group, c the input and o the output channel in it. Mesh axes that divide a dimension
divide its factors, the major one first. An operation is divided by giving each mesh axis to at most
one factor. The stack, the batch of x and y, the groups and the channels can be divided; the spatial
factors cannot (see jaxconv.spatial). Each device then runs the same operation on its parts, and
where a factor that the result has not is divided (c in the forward, o in the input gradient, the
batch in the weight gradient) the parts are summed: by an all-reduce, or a reduce-scatter where the
result is divided along the same mesh axes. Nothing else is communicated.

The mesh axes come from two places: from the types, under explicit sharding, and from XLA's sharding
propagation (Shardy's, by `_sharding_rule`, or GSPMD's, by `_infer`) under automatic sharding.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxconv.spec import ConvSpec, Role, channel_axis

Factors = tuple[str, ...]
"""The factors of one dimension, major first."""
Axes = tuple[str, ...]
"""The mesh axes that divide one dimension or factor, major first."""

_SUMMED: dict[Role, Factors] = {"y": ("c",), "x": ("o",), "w": ("n",)}
"""The factors that an operation sums over; those of the batch are called n0, n1, ..."""


@dataclasses.dataclass(frozen=True)
class Factored:
    """The factors of an operation's arrays: of its operands, in order, and of its result."""

    sizes: Mapping[str, int]
    arrays: tuple[tuple[Factors, ...], ...]
    summed: Factors
    whole: Factors
    """Those that cannot be divided."""
    minor: Factors
    """c and o beside groups: a part of a dimension has all of them unless it has one group only."""


def factor(result: Role, roles: Sequence[str], shapes: Sequence[Any], spec: ConvSpec) -> Factored:
    """The factors of arrays of `roles` ("x", "w", "y", "bias"), of which the last is the result."""
    out_shape, sizes, arrays = shapes[-1], {}, []
    x_or_y = next(s for r, s in zip(roles, shapes, strict=True) if r in "xy")
    batch = len(x_or_y) - spec.stack - 1 - spec.rank
    whole: list[str] = []

    def named(name: str, size: int) -> Factors:
        sizes[name] = size
        return (name,)

    def undivided(size: int) -> Factors:
        whole.append(f"z{len(whole)}")
        return named(whole[-1], size)

    def channels(name: str, size: int) -> Factors:
        """g * c or g * o, without a factor of size 1."""
        parts = named("g", spec.groups) if spec.groups > 1 else ()
        inner = size // spec.groups
        return parts if parts and inner == 1 else parts + named(name, inner)

    for role, shape in zip(roles, shapes, strict=True):
        # Along a stack axis of size 1 an operand is shared by all problems.
        dims = [
            named(f"s{i}", n) if n == out_shape[i] else undivided(n)
            for i, n in enumerate(shape[: spec.stack])
        ]
        if role == "w":
            ci, cog = shape[spec.stack : spec.stack + 2]
            dims += [channels("c", ci), named("o", cog) if cog > 1 else undivided(1)]
            dims += [undivided(n) for n in shape[spec.stack + 2 :]]
        elif role == "bias":
            dims.append(channels("o", shape[-1]))
        else:
            at = channel_axis(shape, spec)
            for i in range(spec.stack, len(shape)):
                if i < spec.stack + batch:
                    dims.append(named(f"n{i - spec.stack}", shape[i]))
                elif i == at:
                    dims.append(channels("c" if role == "x" else "o", shape[i]))
                else:
                    dims.append(undivided(shape[i]))
        arrays.append(tuple(dims))
    summed = tuple(f for f in sizes if f.rstrip("0123456789") in _SUMMED[result])
    minor = ("c", "o") if spec.groups > 1 else ()
    return Factored(sizes, tuple(arrays), summed, tuple(whole), minor)


def _as_axes(entry: Any) -> Axes:
    """An entry of a PartitionSpec as a tuple."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _spec_axes(spec: PartitionSpec, rank: int) -> list[Axes]:
    entries = [_as_axes(entry) for entry in spec]
    return entries + [()] * (rank - len(entries))


def _split(
    factors: Factors, axes: Axes, sizes: Mapping[str, int], mesh: Mapping[str, int]
) -> Iterator[tuple[str, Axes]]:
    """Divides the mesh axes of one dimension among its factors: the minor one gets what is left
    when the major one is divided into single elements."""
    for i, name in enumerate(factors):
        count, taken = 1, 0
        last = i == len(factors) - 1
        while taken < len(axes) and (last or count < sizes[name]):
            count *= mesh[axes[taken]]
            taken += 1
        yield name, axes[:taken]
        axes = axes[taken:]


@dataclasses.dataclass(frozen=True)
class Division:
    """Which mesh axes divide each factor, and the PartitionSpec of each array that follows."""

    factored: Factored
    mesh: Mapping[str, int]
    axes: Mapping[str, Axes]

    def parts(self, name: str) -> int:
        return math.prod(self.mesh[a] for a in self.axes.get(name, ()))

    def spec(self, array: int) -> PartitionSpec:
        entries = []
        for factors in self.factored.arrays[array]:
            axes = tuple(a for name in factors for a in self.axes.get(name, ()))
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return PartitionSpec(*entries)

    @property
    def summed_over(self) -> Axes:
        """The mesh axes along which the devices hold parts of sums."""
        return tuple(a for name in self.factored.summed for a in self.axes.get(name, ()))


def _objection(division: Division, name: str, wanted: Axes) -> str | None:
    """Why a factor cannot be divided along `wanted` beside what is divided already; None if it can
    be."""
    factored, parts = division.factored, math.prod(division.mesh[a] for a in wanted)
    size = factored.sizes[name]
    if name in division.axes:
        return f"one dimension is divided along {division.axes[name]} and along {wanted}"
    if taken := [a for axes in division.axes.values() for a in axes if a in wanted]:
        return f"two dimensions are divided along {taken}"
    if parts == 1:
        return None
    if name in factored.whole:
        return "spatial axes, kernels and what is shared are not divided (see jaxconv.spatial)"
    if name == "g" and size % parts != 0:
        return f"{size} groups do not divide by {parts} devices"
    if name in factored.minor and (division.parts("g") != factored.sizes["g"] or size % parts != 0):
        return (
            f"{size} channels in each of {factored.sizes['g']} groups do not divide by {parts} "
            f"devices, with the groups divided by {division.parts('g')}"
        )
    return None


def divide(
    factored: Factored,
    mesh: Mapping[str, int],
    shardings: Sequence[Sequence[Axes]],
    strict: str | None = None,
) -> Division:
    """The division that the shardings of the arrays ask for.

    Activations are asked first, so that where a batch and weights are sharded along one mesh axis
    the weights are gathered, and operands before the result. What cannot be divided stays whole;
    with `strict`, the name of the operation, it is an error.
    """
    division = Division(factored, mesh, {})
    is_activation = [any(f[0] == "n" for dim in dims for f in dim) for dims in factored.arrays]
    for array in sorted(range(len(shardings)), key=lambda i: (not is_activation[i], i)):
        for factors, axes in zip(factored.arrays[array], shardings[array], strict=True):
            for name, wanted in _split(factors, axes, factored.sizes, mesh):
                if not wanted or division.axes.get(name) == wanted:
                    continue
                why = _objection(division, name, wanted)
                if why is None:
                    division = dataclasses.replace(division, axes={**division.axes, name: wanted})
                elif strict is not None:
                    raise TypeError(
                        f"jaxconv {strict}: operands of shardings {list(shardings)}: {why}; "
                        "jax.sharding.reshard one of them first"
                    )
    return division


# ---------------------------------------------------------------------------------------------
# What each device does


def _masked(part: jax.Array, dim: int, size: int, axes: Axes) -> jax.Array:
    """A part of a dimension of `size` elements, with zeros where the last parts reach beyond it:
    what is there is arbitrary, and would be added to the sums."""
    index = lax.axis_index(axes) * part.shape[dim]
    index = index + lax.broadcasted_iota(jnp.int32, part.shape, dim)
    return jnp.where(index < size, part, jnp.zeros_like(part))


def _local(
    division: Division,
    bind: Callable[..., jax.Array],
    spec: ConvSpec,
    scattered: Sequence[Axes],
) -> Callable[..., jax.Array]:
    """What each device runs on its parts of the operands. `scattered` has, for each dimension of
    the result, the mesh axes along which its sums are scattered rather than kept by all."""
    factored = division.factored
    uneven = [f for f in factored.summed if factored.sizes[f] % division.parts(f) != 0]
    summed_over = division.summed_over
    local_spec = spec.replace(groups=spec.groups // division.parts("g"))

    def run(*operands: jax.Array) -> jax.Array:
        parts = list(operands)
        for array, dims in enumerate(factored.arrays[:2]):
            for dim, factors in enumerate(dims):
                for name in uneven:
                    if name in factors:
                        size, axes = factored.sizes[name], division.axes[name]
                        parts[array] = _masked(parts[array], dim, size, axes)
        if len(parts) == 3 and summed_over:  # a bias is added once, not by each device
            first = lax.axis_index(summed_over) == 0
            parts[2] = jnp.where(first, parts[2], jnp.zeros_like(parts[2]))
        out = bind(*parts, spec=local_spec)
        rest = tuple(a for a in summed_over if not any(a in axes for axes in scattered))
        for dim, axes in enumerate(scattered):
            if axes:
                out = lax.psum_scatter(out, axes, scatter_dimension=dim, tiled=True)
        return lax.psum(out, rest) if rest else out

    return run


def _scattered(division: Division, wanted: Sequence[Axes]) -> list[Axes]:
    """For each dimension of the result the mesh axes, among those that are summed over, along which
    the result is wanted divided."""
    over, found = division.summed_over, []
    for factors, axes in zip(division.factored.arrays[-1], wanted, strict=True):
        whole = all(division.parts(f) == 1 for f in factors)
        parts = math.prod(division.mesh[a] for a in axes)
        size = math.prod(division.factored.sizes[f] for f in factors)
        fits = whole and all(a in over for a in axes) and size % parts == 0
        found.append(tuple(axes) if fits else ())
    return found


def _with_scattered(spec: PartitionSpec, scattered: Sequence[Axes]) -> PartitionSpec:
    return PartitionSpec(*(axes or entry for entry, axes in zip(spec, scattered, strict=True)))


# ---------------------------------------------------------------------------------------------
# Explicit sharding


def like(value: jax.Array, aval: Any) -> jax.Array:
    """A cotangent, sharded as the type that it belongs to says."""
    if not aval.sharding.mesh.explicit_axes or jax.typeof(value).sharding == aval.sharding:
        return value
    return jax.sharding.reshard(value, aval.sharding)


def explicit_axes(aval: Any) -> list[Axes]:
    """The mesh axes by which a type says that its dimensions are divided."""
    return _spec_axes(aval.sharding.spec, len(aval.shape))


def explicit(
    result: Role, roles: Sequence[str], avals: Sequence[Any], shape: Any, spec: ConvSpec, name: str
) -> Division:
    """The division by the operands' types, which must agree."""
    (mesh,) = {a.sharding.mesh for a in avals if not a.sharding.mesh.empty}
    factored = factor(result, (*roles, result), [*(a.shape for a in avals), shape], spec)
    return divide(factored, dict(mesh.shape), [explicit_axes(a) for a in avals], strict=name)


def lower_explicit(
    division: Division, mesh: Any, bind: Callable[..., jax.Array], spec: ConvSpec
) -> Callable[..., jax.Array]:
    """A function of the operands in which each device computes its part by shard_map."""
    count = len(division.factored.arrays) - 1
    local = _local(division, bind, spec, [()] * len(division.factored.arrays[-1]))
    axes = {a for factor_axes in division.axes.values() for a in factor_axes}
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(division.spec(i) for i in range(count)),
        out_specs=division.spec(count),
        axis_names=axes,
        check_vma=False,
    )


# ---------------------------------------------------------------------------------------------
# Automatic sharding


def _in_order(factored: Factored, names: Sequence[str]) -> Factors:
    """In order of first appearance, as Shardy wants them."""
    return tuple(f for f in factored.sizes if f in names)


def _sharding_rule(factored: Factored) -> SdyShardingRule:
    def mapping(dims: Sequence[Factors]) -> ArrayMapping:
        return ArrayMapping(*(f[0] if len(f) == 1 else CompoundFactor(*f) for f in dims))

    *operands, out = (mapping(dims) for dims in factored.arrays)
    alone = {d[0] for dims in factored.arrays for d in dims if len(d) == 1}
    sizes: Any = {f: size for f, size in factored.sizes.items() if f not in alone}
    return SdyShardingRule(
        tuple(operands),
        (out,),
        reduction_factors=factored.summed,
        need_replication_factors=factored.whole,
        **sizes,
    )


def _known_axes(shape: Any) -> list[Axes]:
    """The mesh axes by which XLA has an array divided; none where it has no name for them."""
    spec = getattr(shape.sharding, "spec", PartitionSpec())
    return _spec_axes(spec, len(shape.shape))


def lower_auto(
    factored: Factored, bind: Callable[..., jax.Array], spec: ConvSpec
) -> Callable[..., jax.Array]:
    """A function of the operands that XLA's partitioner asks how to divide itself."""
    if jax.sharding.get_mesh().explicit_axes:
        # Inside auto_axes jax lowers a sum in the partitioner's callback to what XLA cannot read:
        # what would be summed over is gathered.
        undivided = _in_order(factored, (*factored.whole, *factored.summed))
        factored = dataclasses.replace(factored, summed=(), whole=undivided)

    def division_of(mesh: Any, operands: Sequence[Any], out: Sequence[Any]) -> Division:
        return divide(factored, dict(mesh.shape), [_known_axes(a) for a in (*operands, *out)])

    def infer(mesh: Any, operands: Sequence[Any], out: Any) -> NamedSharding:
        return NamedSharding(mesh, division_of(mesh, operands, ()).spec(-1))

    def partition(mesh: Any, operands: Sequence[Any], out: Any) -> Any:
        division = division_of(mesh, operands, (out,))
        scattered = _scattered(division, _known_axes(out))
        shardings = [NamedSharding(mesh, division.spec(i)) for i in range(len(operands))]
        out_spec = _with_scattered(division.spec(-1), scattered)
        local = _local(division, bind, spec, scattered)
        return mesh, local, NamedSharding(mesh, out_spec), tuple(shardings)

    def whole(*operands: jax.Array) -> jax.Array:
        return bind(*operands, spec=spec)

    divided: Any = custom_partitioning(whole)
    divided.def_partition(
        partition, infer_sharding_from_operands=infer, sharding_rule=_sharding_rule(factored)
    )
    return divided


def with_mesh(ctx: Any) -> Any:
    """A lowering's context in which custom_partitioning finds the mesh: where neither arguments nor
    constraints name one, that of jax.set_mesh."""
    axes, mesh = ctx.module_context.axis_context, jax.sharding.get_mesh()
    if getattr(axes, "abstract_mesh", mesh) is not None or mesh.empty:
        return ctx
    axes = dataclasses.replace(axes, abstract_mesh=mesh.abstract_mesh)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=axes))


def say_what(values: Sequence[Any], what: str) -> None:
    """Notes in the lowered custom_partitioning call what it computes. The call names it only by a
    pointer, which jax_remove_custom_partitioning_ptr_from_cache_key leaves out of the persistent
    cache's key: without this, calls that differ in their padding alone would share an entry."""
    for call in (value.owner for value in values):
        if call.name != "stablehlo.custom_call":
            continue
        call.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(
            {"jaxconv": mlir.ir.StringAttr.get(what)}
        )


def require_devices(primitive: Primitive) -> None:
    """Has JAX tell the lowering of a primitive which devices it is for, as custom_partitioning
    needs. JAX has no public way to say so; where its private one is gone, arrays are gathered under
    automatic sharding, and everything else stays as it is."""
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering
    except ImportError:
        return
    prim_requires_devices_during_lowering.add(primitive)
