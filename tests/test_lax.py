"""jaxconv.conv_transpose against jax.lax.conv_transpose, and the gradient of a convolution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxconv
from jaxconv import spec as specs

NUMBERS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def inputs(rank: int, i: int, ci: int, co: int, k: int, swapped: bool):
    rng = np.random.default_rng(rank)
    lhs = rng.standard_normal((2, *(i + axis for axis in range(rank)), ci))
    features = (co, ci) if swapped else (ci, co)
    rhs = rng.standard_normal((*(k + axis for axis in range(rank)), *features))
    return jnp.asarray(lhs), jnp.asarray(rhs)


def assert_same(arguments, keywords):
    actual = jaxconv.conv_transpose(*arguments, **keywords)
    wanted = jax.lax.conv_transpose(*arguments, **keywords)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("consistent", [False, True])
def test_padding_strides_and_dilation(platform, rank, transpose_kernel, consistent):
    for k, s, d in itertools.product([1, 2, 3, 4], [1, 2, 3], [1, 2]):
        for padding in ("SAME", "VALID", ((1, 2),) * rank, ((2, -1),) * rank):
            lhs, rhs = inputs(rank, 4, 3, 2, k, transpose_kernel)
            keywords = {
                "rhs_dilation": (d,) * rank,
                "transpose_kernel": transpose_kernel,
                "use_consistent_padding": consistent,
            }
            assert_same((lhs, rhs, (s,) * rank, padding), keywords)
        if rank == 3 and k == 2:
            break  # 3D differs in nothing but the number of axes


@pytest.mark.parametrize(
    "numbers",
    [
        ("NCHW", "OIHW", "NCHW"),
        ("NCHW", "HWIO", "NHWC"),
        ("NHWC", "OIHW", "NCHW"),
        ("CNHW", "IHOW", "WNHC"),
        ("HWNC", "WHIO", "CHNW"),
    ],
)
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_dimension_numbers(platform, numbers, transpose_kernel):
    lhs, rhs = inputs(2, 5, 3, 2, 3, transpose_kernel)
    lhs = jnp.transpose(lhs, ["NHWC".index(letter) for letter in numbers[0]])
    rhs = jnp.transpose(rhs, ["HWIO".index(letter) for letter in numbers[1]])
    for form in (numbers, jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)):
        assert_same(
            (lhs, rhs, (2, 3), "SAME"),
            {"dimension_numbers": form, "transpose_kernel": transpose_kernel},
        )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_defaults(platform, rank):
    assert_same((*inputs(rank, 4, 3, 2, 3, False), (2,) * rank, "SAME"), {})


@pytest.mark.parametrize("rank", [1, 2])
def test_empty_axes(platform, rank):
    lhs, rhs = inputs(rank, 4, 3, 2, 3, False)
    assert_same((lhs[:0], rhs, (2,) * rank, "SAME"), {})
    assert_same((lhs[:, :0], rhs, (2,) * rank, ((4, 3),) * rank), {})


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("s", [1, 2, 3])
def test_feature_group_count(platform, groups, s):
    """Against lax.conv_general_dilated, which lax.conv_transpose wraps and which has groups."""
    rng = np.random.default_rng(7)
    lhs, rhs = rng.standard_normal((2, 5, 6, 8)), rng.standard_normal((3, 2, 8 // groups, 12))
    actual = jaxconv.conv_transpose(lhs, rhs, (s, s), "VALID", feature_group_count=groups)
    pads = [
        (k - 1 - a, k - 1 - b)
        for k, (a, b) in zip(
            (3, 2), specs.lax_pads("", "VALID", (3, 2), (s, s), (1, 1), False), strict=True
        )
    ]
    wanted = jax.lax.conv_general_dilated(
        jnp.asarray(lhs), jnp.asarray(rhs), (1, 1), pads, (s, s),
        dimension_numbers=NUMBERS[2], feature_group_count=groups,
    )  # fmt: skip
    np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_is_the_gradient_of_a_convolution(platform, groups, channels_last):
    """The second oracle: a transposed convolution is the VJP of a convolution by its input, and
    its own gradients are that convolution and the convolution's gradient by the kernel."""
    rng = np.random.default_rng(8)
    s, p, d, k, i, ci, co = (2, 3), (1, 2), (2, 1), (3, 4), (5, 6), 4, 6
    pads = tuple((a, a) for a in p)
    o = tuple(specs.output_size(*axis, 1) for axis in zip(i, k, s, pads, d, strict=True))
    w = jnp.asarray(rng.standard_normal((ci, co // groups, *k)))
    x = jnp.asarray(rng.standard_normal((2, *i, ci) if channels_last else (2, ci, *i)))
    y = jnp.asarray(rng.standard_normal((2, *o, co) if channels_last else (2, co, *o)))
    data = "NHWC" if channels_last else "NCHW"

    def conv(y, w):  # co to ci: w is (ci, co / groups, *k) = OIHW
        return jax.lax.conv_general_dilated(
            y, w, s, pads, rhs_dilation=d,
            dimension_numbers=(data, "OIHW", data), feature_group_count=groups,
        )  # fmt: skip

    def conv_transpose(x, w):
        return jaxconv.conv_transpose2d(
            x, w, None, s, p, 1, groups, d,
            data_format="channels_last" if channels_last else "channels_first",
        )  # fmt: skip

    convolved, conv_vjp = jax.vjp(conv, y, w)
    upsampled, vjp = jax.vjp(conv_transpose, x, w)
    dy, dw = conv_vjp(x)
    for actual, wanted in ((upsampled, dy), (vjp(y)[0], convolved), (vjp(y)[1], dw)):
        np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_precision_means_what_it_means_in_lax(implementation):
    """Every form that lax takes is taken, and 'xla' hands it on unchanged."""
    x, w = jnp.ones((1, 2, 5), "float32"), jnp.ones((2, 2, 3), "float32")
    highest = jax.lax.Precision.HIGHEST
    forms = [None, "highest", "float32", "tensorfloat32", "default", "bfloat16_3x", highest,
             (highest, jax.lax.Precision.DEFAULT), ("high", "highest")]  # fmt: skip

    def f(x, w, precision=None):
        return jaxconv.conv_transpose1d(x, w, precision=precision, implementation=implementation)

    for form in forms:
        jaxpr = str(jax.make_jaxpr(lambda x, w: f(x, w, form))(x, w))  # noqa: B023
        assert "jaxconv_forward" in jaxpr
    with jax.default_matmul_precision("highest"):
        text = jax.jit(f).lower(x, w).as_text()
    assert implementation is None or "HIGHEST" in text
    with pytest.raises(ValueError, match="conv_transpose1d: precision must be"):
        f(x, w, "exact")
