"""Every kernel of every platform against the definition: random problems, and the hard ones."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import cases
import oracle
from cases import CASES, DTYPES, Case
from jaxconv import ffi, primitive
from jaxconv.spec import ConvSpec, Role
from workloads import WORKLOADS

KERNEL_CASES = CASES + [cases.shrunk(w) for w in WORKLOADS]
ROLES: tuple[Role, ...] = ("y", "x", "w")


def case_id(c: Case) -> str:
    return c.name


Arrays = dict[str, jax.Array]


def apply(result: Role, spec: ConvSpec, arrays: Arrays) -> jax.Array:
    a, b = (arrays[role] for role in primitive.OPERANDS[result])
    if result == "y":
        return primitive.forward(a, b, arrays.get("bias"), spec)
    return (primitive.input_grad if result == "x" else primitive.weight_grad)(a, b, spec)


@functools.partial(jax.jit, static_argnames="calls")
def run(calls: tuple[tuple[Role, ConvSpec], ...], arrays: Arrays) -> list[jax.Array]:
    """Several operations in one executable, since it is compiling that takes the time."""
    return [apply(result, spec, arrays) for result, spec in calls]


def kernels(platform: str, result: Role, c: Case, dtype: str, spec: ConvSpec) -> list[str]:
    """The names of all kernels that take a problem."""
    shapes = {"x": c.x_shape, "w": c.w_shape, "y": c.y_shape}
    if spec.channels_last:
        shapes |= {r: (s[0], *s[2:], s[1]) for r, s in shapes.items() if r != "w"}
    avals = {r: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for r, s in shapes.items()}
    out = jax.ShapeDtypeStruct(avals[result].shape, jnp.dtype(spec.out_dtype or dtype))
    rows = ffi.verdicts(platform, result, out=out, bias=result == "y", spec=spec, **avals)
    return [name for name, refusal, _, _ in rows if not refusal]


def check(
    platform: str, c: Case, dtype: str, channels_last: bool, *, wide: bool = False, precision=None
) -> None:
    """Runs all three operations of a problem by every kernel that takes it."""
    spec = c.spec(
        channels_last=channels_last,
        precision=precision,
        out_dtype=np.dtype("float32") if wide else None,
    )
    out_dtype = "float32" if wide else dtype
    tf32 = platform == "cuda" and dtype == "float32" and precision is None
    x, w, y, bias = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in c.arrays())
    bias = np.asarray(jnp.asarray(bias, out_dtype), np.float64)
    wide_arrays, definition = {"x": x, "w": w, "y": y}, c.definition()
    arrays = {
        role: jnp.asarray(np.moveaxis(a, 1, -1) if channels_last and role != "w" else a, dtype)
        for role, a in wide_arrays.items()
    }
    arrays["bias"] = jnp.asarray(bias, out_dtype)
    names = {result: kernels(platform, result, c, dtype, spec) for result in ROLES}
    calls = tuple((r, spec.replace(implementation=name)) for r in ROLES for name in names[r])
    outputs = run(calls, arrays)

    for result in ROLES:
        assert "direct" in names[result]
        a, b = (wide_arrays[role] for role in primitive.OPERANDS[result])
        operation = getattr(definition, result)
        added = bias.reshape(-1, *(1,) * c.rank) if result == "y" else np.zeros(())
        wanted = operation(a, b) + added
        allowed = oracle.bound(operation, a, b, dtype, out_dtype, tf32=tf32, added=added)
        for (role, forced), out in zip(calls, outputs, strict=True):
            if role == result:
                assert out.dtype == out_dtype
                value = np.asarray(out, np.float64)
                value = np.moveaxis(value, -1, 1) if channels_last and result != "w" else value
                what = f"{platform} {result} by {forced.implementation}: {c}"
                oracle.assert_within(value, wanted, allowed, what)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("c", KERNEL_CASES, ids=case_id)
def test_cases(platform, c, channels_last):
    check(platform, c, "float32", channels_last)


# More than "repack" takes at once: some images at a time, the last ones fewer, or bands of rows.
@pytest.mark.parametrize("platform", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    "c",
    [
        cases.case("images_in_chunks", 13, 8, 8, 1, (400, 420), (2, 1)),
        cases.case("bands_2d", 1, 8, 8, 1, (1200, 900), (3, 1), (2, 1), (1, 0)),
        cases.case("bands_3d", 1, 8, 8, 1, (60, 60, 64), (3, 2, 2), 2, (1, 0, 0), 1, (2, 1, 1)),
    ],
    ids=case_id,
)
def test_chunks(platform, c):
    check(platform, c, "float32", False)


# More channels than "phases" takes at once where the other side has one or two.
@pytest.mark.parametrize("platform", ["cpu"], indirect=True)
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "c",
    [
        cases.case("many_to_one", 1, 300, 1, 1, (200,), 3, 2, 1),
        cases.case("many_to_two", 1, 300, 2, 1, (200,), 3, 2, 1),
        cases.case("one_to_many", 1, 1, 300, 1, (200,), 3, 2, 1),
    ],
    ids=case_id,
)
def test_many_to_few_channels(platform, c, dtype, channels_last):
    check(platform, c, dtype, channels_last)


# Rows that end in half a vector, of every width of vectors; of 300 channels, in several panels.
# Channels of a weight with large rows, more than "taps" takes at once.
@pytest.mark.parametrize("platform", ["cpu"], indirect=True)
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "c",
    [
        cases.case("rows_of_12", 1, 16, 8, 1, (7, 12), 3),
        cases.case("rows_of_20", 2, 8, 16, 1, (3, 4, 20), (2, 3, 5), 1, (0, 1, 2)),
        cases.case("rows_of_24", 1, 9, 16, 1, (3, 5, 24), 3, 1, 1),
        cases.case("rows_of_40", 2, 16, 8, 1, (5, 40), 5, 1, 2),
        cases.case("rows_of_56", 1, 8, 8, 1, (3, 3, 56), 3, 1, 1),
        cases.case("panels_of_rows_of_24", 1, 8, 300, 1, (4, 7, 24), 4, 2, 1),
        cases.case("taps_of_many", 1, 5, 300, 1, (9,), 16, 8, 4),
    ],
    ids=case_id,
)
def test_halves_and_pieces(platform, c, dtype, channels_last):
    check(platform, c, dtype, channels_last)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("c", CASES, ids=case_id)
def test_dtypes(platform, c, dtype):
    check(platform, c, dtype, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("c", CASES[::4], ids=case_id)
def test_float32_from_16_bits(platform, c, dtype, channels_last):
    check(platform, c, dtype, channels_last, wide=True)


@pytest.mark.parametrize("c", CASES, ids=case_id)
def test_highest_precision(platform, c):
    check(platform, c, "float32", False, precision=(jax.lax.Precision.HIGHEST,) * 2)


# Two runs of 250 problems each: 500 that no one thought of.
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@hypothesis.settings(max_examples=250)
@hypothesis.given(c=cases.cases(), dtype=st.sampled_from(["float32", "float32", *DTYPES]))
def test_random(platform, channels_last, c, dtype):
    hypothesis.assume(cases.work(c) < 3e6)
    check(platform, c, dtype, channels_last)
    jax.clear_caches()  # thousands of compiled problems would fill the memory


@pytest.mark.parametrize("c", CASES, ids=case_id)
def test_same_bits_in_every_run(platform, c):
    arrays = dict(zip("xwy", (jnp.asarray(a, jnp.float32) for a in c.arrays()[:3]), strict=True))
    calls = tuple((result, c.spec()) for result in ROLES)
    once, twice = run(calls, arrays), run(calls, {role: a + 0 for role, a in arrays.items()})
    for first, second in zip(once, twice, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("result", ROLES)
def test_stack_shares_operands_of_size_1(platform, result):
    c = cases.case("", 2, 4, 6, 2, (4, 5), 3, 2, 1, 1)
    rng = np.random.default_rng(1)
    shapes = {"x": c.x_shape, "w": c.w_shape, "y": c.y_shape}
    first, second = primitive.OPERANDS[result]
    a = jnp.asarray(rng.standard_normal((3, 1, *shapes[first])))
    b = jnp.asarray(rng.standard_normal((1, 2, *shapes[second])))
    (out,) = run(((result, c.spec(stack=2)),), {first: a, second: b})
    for i in range(3):
        for j in range(2):
            (wanted,) = run(((result, c.spec()),), {first: a[i, 0], second: b[0, j]})
            np.testing.assert_array_equal(np.asarray(out[i, j]), np.asarray(wanted))
