"""Every transformation of jax, alone and composed, against the same function in jax.lax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import cases
import jaxconv
from cases import Case
from jaxconv import primitive
from jaxconv.spec import Role

# One problem a rank, with groups, output padding and dilation among them.
TRANSFORMED = [
    cases.case("1d", 2, 4, 6, 2, (7,), 4, 3, 1, 1),
    cases.case("2d", 2, 3, 2, 1, (4, 5), (3, 2), 2, 1, 1, (2, 1)),
    cases.case("3d", 1, 4, 4, 2, (3, 2, 4), 3, 2, 1, (1, 0, 1)),
]
ROLES: tuple[Role, ...] = ("y", "x", "w")
each_case = pytest.mark.parametrize("c", TRANSFORMED, ids=lambda c: c.name)
each_result = pytest.mark.parametrize("result", ROLES)


def function(c: Case, implementation: str | None = None, **arguments):
    """(x, w, bias) to y through the public function."""
    op = (jaxconv.conv_transpose1d, jaxconv.conv_transpose2d, jaxconv.conv_transpose3d)[c.rank - 1]
    return functools.partial(op, **c.arguments(), implementation=implementation, **arguments)


def operation(c: Case, result: Role, implementation: str | None = None):
    """One of the three bilinear operations of a problem."""
    spec = c.spec(implementation=implementation)
    if result == "y":
        return lambda x, w: primitive.forward(x, w, None, spec)
    return functools.partial(
        primitive.input_grad if result == "x" else primitive.weight_grad, spec=spec
    )


def operands(c: Case, result: Role) -> tuple[jax.Array, jax.Array]:
    x, w, y, _ = (jnp.asarray(a) for a in c.arrays())
    arrays = {"x": x, "w": w, "y": y}
    a, b = primitive.OPERANDS[result]
    return arrays[a], arrays[b]


def assert_close(actual, wanted):
    """Equal up to a few roundings of float64 sums of at most some thousand terms."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), actual, wanted
    )


@each_case
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_value_and_all_gradients(platform, c, channels_last):
    x, w, y, bias = (jnp.asarray(a) for a in c.arrays())
    arguments = {"data_format": "channels_last" if channels_last else "channels_first"}
    if channels_last:
        x, y = cases.last(x, c.rank), cases.last(y, c.rank)
    for transform in (lambda f: f, jax.jit):
        value, vjp = jax.vjp(transform(function(c, **arguments)), x, w, bias)
        wanted, wanted_vjp = jax.vjp(function(c, "xla", **arguments), x, w, bias)
        assert_close(value, wanted)
        assert_close(vjp(y), wanted_vjp(y))


@each_case
def test_unbatched(platform, c):
    x, w, _, bias = (jnp.asarray(a) for a in c.arrays())
    assert_close(function(c)(x[0], w, bias), function(c, "xla")(x, w, bias)[0])
    grad = jax.grad(lambda x: jnp.sin(function(c)(x, w, bias)).sum())
    wanted = jax.grad(lambda x: jnp.sin(function(c, "xla")(x, w, bias)).sum())
    assert_close(grad(x[0]), wanted(x)[0])


@each_case
@each_result
def test_order_2_bilinear(platform, c, result):
    f, (a, b) = operation(c, result), operands(c, result)
    # A bilinear function has no curvature in either operand alone: large steps are exact.
    check_grads(lambda a: f(a, b), (a,), order=2, modes=["fwd", "rev"], eps=1.0, rtol=1e-10)
    check_grads(lambda b: f(a, b), (b,), order=2, modes=["fwd", "rev"], eps=1.0, rtol=1e-10)
    check_grads(f, (a, b), order=2, modes=["fwd", "rev"])


def test_order_3(platform):
    c = TRANSFORMED[0]
    x, w, _, bias = (jnp.asarray(a) for a in c.arrays())
    check_grads(
        lambda *a: jnp.sin(function(c)(*a)), (x, w, bias), order=3, modes=["fwd", "rev"], rtol=2e-3
    )


@each_case
def test_jvp_and_linearize(platform, c):
    primals = tuple(jnp.asarray(a) for a in np.array(c.arrays(), object)[[0, 1, 3]])
    tangents = tuple(jnp.asarray(a) for a in np.array(c.arrays(1), object)[[0, 1, 3]])
    wanted = jax.jvp(function(c, "xla"), primals, tangents)
    assert_close(jax.jvp(function(c), primals, tangents), wanted)
    value, linear = jax.linearize(function(c), *primals)
    assert_close((value, linear(*tangents)), wanted)


@each_case
def test_jvp_by_one_operand(platform, c):
    x, w, _, bias = (jnp.asarray(a) for a in c.arrays())
    for argument, primal in enumerate((x, w, bias)):

        def of(value, *, f, argument=argument):
            arguments = [x, w, bias]
            arguments[argument] = value
            return f(*arguments)

        actual = jax.jvp(functools.partial(of, f=function(c)), (primal,), (primal + 1,))
        wanted = jax.jvp(functools.partial(of, f=function(c, "xla")), (primal,), (primal + 1,))
        assert_close(actual, wanted)


@each_case
def test_linear_transpose(platform, c):
    x, w, y, bias = (jnp.asarray(a) for a in c.arrays())
    by_x_and_bias = jax.linear_transpose(lambda x, b: function(c)(x, w, b), x, bias)
    _, wanted = jax.vjp(lambda x, b: function(c, "xla")(x, w, b), x, bias)
    assert_close(by_x_and_bias(y), wanted(y))
    by_w_and_bias = jax.linear_transpose(lambda w, b: function(c)(x, w, b), w, bias)
    _, wanted = jax.vjp(lambda w, b: function(c, "xla")(x, w, b), w, bias)
    assert_close(by_w_and_bias(y), wanted(y))
    with pytest.raises(ValueError, match="affine"):
        jax.linear_transpose(lambda x: function(c)(x, w, bias), x)(y)


def test_hessian(platform):
    c = cases.case("", 1, 2, 2, 1, (3,), 2, 2)
    x, w, _, bias = (jnp.asarray(a) for a in c.arrays())

    def loss(f, x, w, b):
        return jnp.tanh(f(x, w, b)).sum()

    actual = jax.hessian(functools.partial(loss, function(c)), argnums=(0, 1, 2))(x, w, bias)
    wanted = jax.hessian(functools.partial(loss, function(c, "xla")), argnums=(0, 1, 2))
    assert_close(actual, wanted(x, w, bias))
    twice = jax.jacrev(jax.jacrev(functools.partial(loss, function(c)), argnums=1), argnums=0)
    wanted = jax.jacrev(jax.jacrev(functools.partial(loss, function(c, "xla")), argnums=1))
    assert_close(twice(x, w, bias), wanted(x, w, bias))


@pytest.mark.parametrize("size", [0, 1, 3])
@each_case
@each_result
def test_vmap_every_pair_of_axes(platform, c, result, size):
    a, b = operands(c, result)
    axes_a, axes_b = [None, *range(a.ndim + 1)], [None, *range(b.ndim + 1)]
    rng = np.random.default_rng(2)
    for in_a, in_b in itertools.product(axes_a, axes_b):
        if in_a is None and in_b is None:
            continue
        # Every axis with every axis costs minutes; each axis with none, the first and the last
        # visits all the places an axis can come from and go to.
        if None not in (in_a, in_b) and not {in_a, in_b} & {0, max(a.ndim, b.ndim)}:
            continue
        shape_a = a.shape if in_a is None else (*a.shape[:in_a], size, *a.shape[in_a:])
        shape_b = b.shape if in_b is None else (*b.shape[:in_b], size, *b.shape[in_b:])
        mapped = tuple(jnp.asarray(rng.standard_normal(s)) for s in (shape_a, shape_b))
        out = jax.jit(jax.vmap(operation(c, result), (in_a, in_b)))(*mapped)
        wanted = [
            operation(c, result)(
                mapped[0] if in_a is None else jnp.take(mapped[0], i, in_a),
                mapped[1] if in_b is None else jnp.take(mapped[1], i, in_b),
            )
            for i in range(size)
        ]
        assert out.shape[0] == size
        if size:
            assert_close(out, jnp.stack(wanted))


@each_case
@each_result
def test_vmap_of_vmap(platform, c, result):
    a, b = operands(c, result)
    rng = np.random.default_rng(3)
    for inner, outer in itertools.product([(0, None), (None, 0), (0, 0), (1, 1)], repeat=2):
        shapes = []
        for s, i, o in zip((a.shape, b.shape), inner, outer, strict=True):
            s = s if i is None else (*s[:i], 2, *s[i:])
            shapes.append(s if o is None else (*s[:o], 3, *s[o:]))
        mapped = [jnp.asarray(rng.standard_normal(s)) for s in shapes]
        out = jax.vmap(jax.vmap(operation(c, result), inner), outer)(*mapped)
        wanted = jax.vmap(jax.vmap(operation(c, result, "xla"), inner), outer)(*mapped)
        assert_close(out, wanted)


@each_case
@pytest.mark.parametrize("mapped", list(itertools.product([0, None], repeat=3))[:-1])
def test_vmap_of_gradients_with_bias(platform, c, mapped):
    rng = np.random.default_rng(4)
    shapes = (c.x_shape, c.w_shape, (c.co,))
    values = [
        jnp.asarray(rng.standard_normal(s if m is None else (3, *s)))
        for s, m in zip(shapes, mapped, strict=True)
    ]

    def gradients(implementation):
        f = function(c, implementation)
        return jax.vmap(
            jax.value_and_grad(lambda x, w, b: jnp.sin(f(x, w, b)).sum(), (0, 1, 2)), mapped
        )(*values)

    assert_close(gradients(None), gradients("xla"))


@each_case
def test_gradient_of_vmap(platform, c):
    rng = np.random.default_rng(5)
    x, w = (jnp.asarray(rng.standard_normal((3, *s))) for s in (c.x_shape, c.w_shape))

    def hessian_vector_product(implementation):
        f = jax.vmap(function(c, implementation), (0, None))
        g = jax.vmap(function(c, implementation), (None, 0))

        def loss(x, w):
            return jnp.sin(f(x, w[0]) + g(x[0], w)).sum()

        return jax.jvp(jax.grad(loss, (0, 1)), (x, w), (w.sum() * x, x.sum() * w))

    assert_close(hessian_vector_product(None), hessian_vector_product("xla"))


def test_scan_checkpoint_and_control_flow(platform):
    c = cases.case("", 2, 4, 4, 2, (5, 6), 3, 1, 1)  # keeps its shape, so it can be repeated
    x, _, _, bias = (jnp.asarray(a) for a in c.arrays())
    ws = jnp.asarray(np.random.default_rng(6).standard_normal((4, *c.w_shape)))

    def loss(implementation, x, ws):
        @jax.checkpoint
        def layer(x, w):
            y = jnp.tanh(function(c, implementation)(x, w, bias))
            return jax.lax.cond(y.sum() > 0, lambda y: y, lambda y: y * 0.5, y), y.mean()

        x, means = jax.lax.scan(layer, x, ws)
        x = jax.lax.fori_loop(0, 2, lambda _, x: function(c, implementation)(x, ws[0]), x)
        return x.mean() + means.sum()

    actual = jax.jit(jax.value_and_grad(functools.partial(loss, None), (0, 1)))(x, ws)
    wanted = jax.jit(jax.value_and_grad(functools.partial(loss, "xla"), (0, 1)))(x, ws)
    assert_close(actual, wanted)


@each_case
def test_complex_and_integers_run_through_lax(platform, c):
    x, w, _, _ = c.arrays()
    if platform == "cpu":  # XLA has no integer convolution on GPUs
        xi, wi = (jnp.asarray(np.round(3 * a), jnp.int32) for a in (x, w))
        wanted = c.definition().y(np.asarray(xi, float), np.asarray(wi, float))
        np.testing.assert_array_equal(function(c)(xi, wi), wanted)
    z = function(c)(jnp.asarray(x + 2j * x), jnp.asarray(w - 1j * w))
    assert_close(z, (1 + 2j) * (1 - 1j) * c.definition().y(x, w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_preferred_element_type(platform, dtype):
    c = TRANSFORMED[2]
    x, w, y, _ = (jnp.asarray(a, dtype) for a in c.arrays())
    bias = jnp.asarray(c.arrays()[3], "float32")
    f = function(c, preferred_element_type="float32")
    value, vjp = jax.vjp(f, x, w, bias)
    assert value.dtype == jnp.float32
    wide = [jnp.asarray(a, "float64") for a in (x, w, bias)]
    wanted, wanted_vjp = jax.vjp(function(c, "xla"), *wide)
    # float32 sums of exact products, of a few hundred terms.
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    cotangents = vjp(jnp.asarray(y, "float32"))
    assert [g.dtype for g in cotangents] == [dtype, dtype, "float32"]
    eps = float(jnp.finfo(dtype).eps)
    for actual, want in zip(cotangents, wanted_vjp(jnp.asarray(y, "float64")), strict=True):
        np.testing.assert_allclose(np.asarray(actual, float), want, rtol=eps, atol=eps)
