"""Operations divided over 4 and 8 CPU devices: what is communicated, and the values.

The table of docs/partitioning.md is that of SHARDINGS; `python tests/test_partitioning.py` prints
it.
"""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import jaxconv
import oracle

PASSES = ("y", "x", "w")


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Arrays sharded over a mesh of axes b (batch), g (groups), c and o (channels in a group), and
    the collectives that each pass ends in."""

    name: str
    groups: str
    """1, 2 or C: as many as there are input channels."""
    x: P
    w: P
    y: P
    y_ends_in: str = ""
    x_ends_in: str = ""
    w_ends_in: str = ""
    dw: P | None = None
    """How the weight gradient is wanted, if not as w is."""

    @property
    def axes(self) -> tuple[str, ...]:
        entries = [e for spec in (self.x, self.w, self.y) for e in spec if e is not None]
        names = [a for e in entries for a in (e if isinstance(e, tuple) else (e,))]
        return tuple(dict.fromkeys(names))

    def wanted(self, result: str) -> str:
        return {"y": self.y_ends_in, "x": self.x_ends_in, "w": self.w_ends_in}[result]


REDUCE, SCATTER = "all-reduce", "reduce-scatter"
# fmt: off
SHARDINGS = [
    *(Sharding("batch", g, P("b"), P(), P("b"), w_ends_in=REDUCE) for g in "12C"),
    *(Sharding("batch, and the weight gradient", g, P("b"), P(), P("b"), w_ends_in=SCATTER,
               dw=P("b")) for g in "12C"),
    *(Sharding("groups", g, P(None, "g"), P("g"), P(None, "g")) for g in "2C"),
    Sharding("output channels", "1", P(), P(None, "o"), P(None, "o"), x_ends_in=REDUCE),
    *(Sharding("groups and output channels", g, P(None, "g"), P("g", "o"), P(None, ("g", "o")),
               x_ends_in=REDUCE) for g in "2C"),
    Sharding("input channels", "1", P(None, "c"), P("c"), P(), y_ends_in=REDUCE),
    Sharding("groups and input channels", "2", P(None, ("g", "c")), P(("g", "c")), P(None, "g"),
             y_ends_in=REDUCE),
    *(Sharding("batch and groups", g, P("b", "g"), P("g"), P("b", "g"), w_ends_in=REDUCE)
      for g in "2C"),
    Sharding("batch and output channels", "1", P("b"), P(None, "o"), P("b", "o"), x_ends_in=REDUCE,
             w_ends_in=REDUCE),
    Sharding("batch and input channels", "1", P("b", "c"), P("c"), P("b"), y_ends_in=REDUCE,
             w_ends_in=REDUCE),
]
# fmt: on


def table() -> str:
    """The table of docs/partitioning.md."""
    lines = [
        "| sharded | groups | x | w | y | forward | input gradient | weight gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in SHARDINGS:
        specs = [f"`{str(p).replace('PartitionSpec', 'P')}`" for p in (s.x, s.w, s.y)]
        if s.dw is not None:
            specs[1] += f", its gradient `{str(s.dw).replace('PartitionSpec', 'P')}`"
        ends = [s.wanted(r) or "nothing" for r in PASSES]
        if s.dw is not None:
            ends[:2] = ["as above"] * 2
        lines.append(f"| {' | '.join([s.name, s.groups, *specs, *ends])} |")
    return "\n".join(lines)


def test_docs_have_the_table():
    docs = pathlib.Path(__file__).parent.parent / "docs" / "partitioning.md"
    assert table() in docs.read_text()


def mesh_of(s: Sharding, devices: int, kind: AxisType) -> Mesh:
    """Two devices an axis, and the rest along one that may have more than two."""
    sizes = dict.fromkeys(s.axes, 2)
    rest = [a for a in s.axes if a != "g" or s.groups == "C"] or ["unused"]
    sizes[rest[0]] = devices // (math.prod(sizes.values()) // sizes.get(rest[0], 1))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(kind,) * len(sizes),
        devices=jax.devices("cpu")[:devices],
    )


def case_of(s: Sharding, mesh: Mesh) -> cases.Case:
    """Two elements of every dimension for each device."""
    batch = 2 * mesh.shape.get("b", 1)
    if s.groups == "C":
        g = 2 * mesh.shape["b"] if s.dw is not None else mesh.shape.get("g", 4)
        return cases.case("", batch, g, 2 * g * mesh.shape.get("o", 1), g, (5, 4), (3, 4), 2, 1)
    g = int(s.groups)
    ci = 2 * g * mesh.shape.get("c", 1)
    if s.dw is not None:
        ci = 2 * mesh.shape["b"]
    return cases.case("", batch, ci, 2 * g * mesh.shape.get("o", 1), g, (5, 4), (3, 4), 2, 1)


def collectives(compiled: Any) -> dict[str, int]:
    names = (
        "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    found = re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())
    return dict(collections.Counter(found))


def operation(c: cases.Case) -> Callable[..., jax.Array]:
    op = {1: jaxconv.conv_transpose1d, 2: jaxconv.conv_transpose2d}[c.rank]
    return lambda x, w, *bias: op(x, w, *bias, **c.arguments())


def passes(forward: Callable[..., jax.Array]) -> dict[str, Callable[..., jax.Array]]:
    """The forward and both gradients, as functions of x, w and y of which each ignores one."""

    def input_grad(x, w, y):
        return jax.vjp(lambda x: forward(x, w), x)[1](y)[0]

    def weight_grad(x, w, y):
        return jax.vjp(lambda w: forward(x, w), w)[1](y)[0]

    return {"y": lambda x, w, y: forward(x, w), "x": input_grad, "w": weight_grad}


MODES = ("auto", "explicit", "shard_map", "shard_map_unchecked")
RUNS = [(s, n, m) for s in SHARDINGS for m in MODES for n in ((4, 8) if m == "auto" else (4,))]
# Where a type is to be divided otherwise than its operands is for the compiler to find.
RUNS = [(s, n, m) for s, n, m in RUNS if s.dw is None or m == "auto"]


@pytest.mark.parametrize(
    ("s", "devices", "mode"),
    RUNS,
    ids=[f"{s.name}-g{s.groups}-{n}-{m}".replace(" ", "_") for s, n, m in RUNS],
)
def test_collectives_and_values(s, devices, mode):
    mesh = mesh_of(s, devices, AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    c = case_of(s, mesh)
    x, w, y, _ = (a.astype(np.float32) for a in c.arrays())
    specs = {"x": s.x, "w": s.w, "y": s.y}
    arrays = [
        jax.device_put(a, NamedSharding(mesh, p))
        for a, p in zip((x, w, y), specs.values(), strict=True)
    ]
    one = jax.devices("cpu")[0]
    single = passes(operation(c))
    divided = dict(single)
    if mode.startswith("shard_map"):
        groups = mesh.shape.get("g", 1) if s.groups != "1" and "g" in s.axes else 1
        local = operation(dataclasses.replace(c, g=c.g // groups))

        def forward(x, w):
            out = local(x, w)
            return lax.psum(out, "c") if "c" in s.axes else out

        mapped = jax.shard_map(
            forward,
            mesh=mesh,
            in_specs=(s.x, s.w),
            out_specs=s.y,
            check_vma=mode == "shard_map",
        )
        divided = passes(mapped)
    definition = c.definition()
    for result in PASSES if s.dw is None else "w":
        options: dict[str, Any] = {}
        if mode == "auto":
            out_spec = s.dw if result == "w" and s.dw is not None else specs[result]
            options["out_shardings"] = NamedSharding(mesh, out_spec)
        compiled = jax.jit(divided[result], **options).lower(*arrays).compile()
        ends_in = s.wanted(result)
        # Without replication checks shard_map cannot know that a cotangent is the same everywhere
        # (that of a sum, or along an axis that divides nothing), and adds it up again.
        if not (mode == "shard_map_unchecked" and {"c", "unused"} & {*mesh.axis_names}):
            assert collectives(compiled) == ({ends_in: 1} if ends_in else {}), result
        got = np.asarray(compiled(*arrays))
        with jax.default_device(one):
            alone = np.asarray(jax.jit(single[result])(x, w, y))
        if s.axes == ("b",) and result != "w":
            np.testing.assert_array_equal(got, alone, err_msg=result)
        a, b = {"y": (x, w), "x": (y, w), "w": (x, y)}[result]
        operate = getattr(definition, result)
        allowed = oracle.bound(operate, a, b, "float32", "float32")
        oracle.assert_within(got, operate(a, b), allowed, f"{result} {mode}")


# ---------------------------------------------------------------------------------------------
# Transformations


def batch_mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4,), ("b",), axis_types=(kind,), devices=jax.devices("cpu")[:4])


BATCH = cases.case("", 8, 8, 8, 2, (6, 5), 3, 2, 1, 1)


def hessian_vector(f: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
    gradient = jax.grad(lambda x: jnp.sin(f(x, w)).sum())
    return jax.jvp(gradient, (x,), (jnp.cos(x),))[1]


def scanned(f: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
    """The gradient by w of two checkpointed layers in a scan."""

    def layer(x: jax.Array, w: jax.Array):
        return jnp.tanh(f(x, w)[..., : x.shape[-2], : x.shape[-1]]), None

    def loss(w: jax.Array) -> jax.Array:
        return lax.scan(jax.checkpoint(layer), x, jnp.stack([w, w]))[0].sum()

    return jax.grad(loss)(w)


COMPOSED: Mapping[str, tuple[Callable[..., jax.Array], bool]] = {
    # what is computed, and whether a sum over the batch is in it
    "hessian": (hessian_vector, False),
    "scan_checkpoint": (scanned, True),
    "vmap_examples": (lambda f, x, w: jax.vmap(lambda x: f(x, w))(x), False),
    "vmap_weights": (lambda f, x, w: jax.vmap(lambda w: f(x, w))(jnp.stack([w, w + 1])), False),
    "examples_gradients": (
        lambda f, x, w: jax.vmap(lambda x: jax.grad(lambda w: jnp.sin(f(x, w)).sum())(w))(x),
        False,
    ),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in COMPOSED
        for mode in ("auto", "explicit", "shard_map")
        # Inside shard_map a gradient by what is replicated is summed over the devices.
        if (name, mode) != ("examples_gradients", "shard_map")
    ],
)
def test_transformations(name, mode):
    compose, summed = COMPOSED[name]
    x, w, _, _ = (jnp.asarray(a) for a in BATCH.arrays())
    f = operation(BATCH)
    mesh = batch_mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    function = lambda x, w: compose(f, x, w)  # noqa: E731
    if mode == "shard_map":
        inner = f

        def f(x, w):
            return jax.shard_map(inner, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))(x, w)

        if name == "vmap_examples":
            # One example is not divided: what is mapped is inside.
            function = jax.shard_map(
                lambda x, w: compose(inner, x, w),
                mesh=mesh,
                in_specs=(P("b"), P()),
                out_specs=P("b"),
            )
    sharded = [
        jax.device_put(x, NamedSharding(mesh, P("b"))),
        jax.device_put(w, NamedSharding(mesh, P())),
    ]
    compiled = jax.jit(function).lower(*sharded).compile()
    found = collectives(compiled)
    assert "all-gather" not in found
    assert set(found) == ({"all-reduce"} if summed else set())
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = compose(operation(BATCH), x, w)
    np.testing.assert_allclose(np.asarray(compiled(*sharded)), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_bias_is_added_once(mode):
    """Also where the input channels are divided, and by its gradient."""
    mesh = jax.make_mesh(
        (2, 2),
        ("b", "c"),
        axis_types=(AxisType.Explicit if mode == "explicit" else AxisType.Auto,) * 2,
        devices=jax.devices("cpu")[:4],
    )
    c = dataclasses.replace(BATCH, g=1)
    x, w, _, bias = (jnp.asarray(a) for a in c.arrays())

    def loss(x, w, bias):
        return jnp.sin(operation(c)(x, w, bias)).sum()

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    sharded = [
        jax.device_put(a, NamedSharding(mesh, p))
        for a, p in ((x, P("b", "c")), (w, P("c")), (bias, P()))
    ]
    compiled = gradients.lower(*sharded).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = gradients(x, w, bias)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
        compiled(*sharded),
        wanted,
    )


@pytest.mark.parametrize("poison", [np.nan, 1e6])
@pytest.mark.parametrize("sharded", ["batch", "input", "output"])
def test_uneven_parts(sharded, poison):
    """What pads the last device's part takes no part in the sums."""
    mesh = batch_mesh()
    c = cases.case("", 6, 6, 6, 1, (5, 4), 3, 2, 1)
    x, w, y, _ = (jnp.asarray(a) for a in c.arrays())
    specs = {
        "batch": (P("b"), P(), P("b")),
        "input": (P(None, "b"), P("b"), P()),
        "output": (P(), P(None, "b"), P(None, "b")),
    }[sharded]

    for result, function in passes(operation(c)).items():

        def divided(x, w, y, function=function):
            # What is cut off was there, and remains where it was.
            padded = [
                jnp.pad(a, [(0, 2)] * 2 + [(0, 0)] * 2, constant_values=poison) for a in (x, w, y)
            ]
            cut = [a[: b.shape[0], : b.shape[1]] for a, b in zip(padded, (x, w, y), strict=True)]
            parts = [
                lax.with_sharding_constraint(a, NamedSharding(mesh, p))
                for a, p in zip(cut, specs, strict=True)
            ]
            return function(*parts)

        with jax.default_device(jax.devices("cpu")[0]):
            wanted = function(x, w, y)
        replicated = [jax.device_put(a, NamedSharding(mesh, P())) for a in (x, w, y)]
        got = jax.jit(divided)(*replicated)
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11, err_msg=result)


def test_gspmd():
    """The partitioner before Shardy, in those releases of jax that still have it."""
    mesh = batch_mesh()
    x, w, y, _ = BATCH.arrays()
    specs = {"x": P("b"), "w": P(), "y": P("b")}
    arrays = [
        jax.device_put(a, NamedSharding(mesh, p))
        for a, p in zip((x, w, y), specs.values(), strict=True)
    ]
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        for result, function in passes(operation(BATCH)).items():
            compiled = jax.jit(function).lower(*arrays).compile()
            assert collectives(compiled) == ({"all-reduce": 1} if result == "w" else {})
            definition = getattr(BATCH.definition(), result)
            a, b = {"y": (x, w), "x": (y, w), "w": (x, y)}[result]
            np.testing.assert_allclose(compiled(*arrays), definition(a, b), rtol=1e-9, atol=1e-11)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_mesh_from_the_context_alone():
    """A constraint is all that names the mesh."""
    mesh = batch_mesh()
    x, w, _, _ = (jnp.asarray(a) for a in BATCH.arrays())

    def divided(x, w):
        x = lax.with_sharding_constraint(x, P("b"))
        return jax.grad(lambda w: jnp.sin(operation(BATCH)(x, w)).sum())(w)

    with jax.set_mesh(mesh):
        compiled = jax.jit(divided).lower(x, w).compile()
        assert collectives(compiled) == {"all-reduce": 1}
        got = compiled(x, w)
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = jax.grad(lambda w: jnp.sin(operation(BATCH)(x, w)).sum())(w)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11)


def test_automatic_axes_under_explicit_ones():
    mesh = batch_mesh(AxisType.Explicit)
    x, w, _, _ = (jnp.asarray(a) for a in BATCH.arrays())

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sin(operation(BATCH)(x, w)).sum())(w)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("b")))
        got = jax.jit(jax.sharding.auto_axes(gradient, out_sharding=P()))(sharded, w)
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_allclose(got, gradient(x, w), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("groups", "x", "w", "message"),
    [
        (1, P("b"), P("b"), "two dimensions are divided along"),
        (1, P(None, None, "b"), P(), "spatial axes"),
        (2, P(None, "b"), P("b"), "2 groups do not divide by 4 devices"),
        (2, P(), P(None, "b"), "4 channels in each of 2 groups"),
    ],
)
def test_explicit_shardings_that_do_not_fit(groups, x, w, message):
    mesh = batch_mesh(AxisType.Explicit)
    c = dataclasses.replace(BATCH, g=groups, i=(8, 8))
    with jax.set_mesh(mesh), pytest.raises(TypeError, match=message):
        operation(c)(
            jax.device_put(np.ones(c.x_shape), NamedSharding(mesh, x)),
            jax.device_put(np.ones(c.w_shape), NamedSharding(mesh, w)),
        )


if __name__ == "__main__":
    print(table())
