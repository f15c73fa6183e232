"""Bad input never crashes: every error, in Python and in the handlers, and what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxconv
from jaxconv import ffi

X = np.ones((2, 4, 5, 6), np.float32)
W = np.ones((4, 3, 3, 3), np.float32)

# Arguments of conv_transpose2d that are wrong, the error, and what its message must name.
BAD = [
    ({"x": X[0, 0]}, ValueError,
     "x must have 4 axes (N, C, *s), or 3 without a batch, got shape (5, 6)"),
    ({"x": X[None]}, ValueError, "got shape (1, 2, 4, 5, 6)"),
    ({"x": X[:, :, :0]}, ValueError, "no spatial axis of size 0, got shape (2, 4, 0, 6)"),
    ({"weight": W[0]}, ValueError,
     "weight must have 4 axes (C_in, C_out/groups, *kernel), got (3, 3, 3)"),
    ({"weight": W[:3]}, ValueError, "the input has 4 channels, weight has shape (3, 3, 3, 3)"),
    ({"weight": W[:, :, :0]}, ValueError,
     "kernel sizes must be positive and at most 2**30, got shape (4, 3, 0, 3)"),
    ({"weight": W.astype(np.float64)}, TypeError,
     "x and weight must have one dtype, got float32 and float64"),
    ({"bias": np.ones(4, np.float32)}, ValueError,
     "bias must have one value an output channel, (3,)"),
    ({"bias": np.ones((3, 1), np.float32)}, ValueError, "got shape (3, 1)"),
    ({"bias": np.ones(3, np.int32)}, TypeError, "bias must have the dtype float32, got int32"),
    ({"stride": 0}, ValueError, "stride must be positive and at most 2**30, got stride=0"),
    ({"stride": (2, -1)}, ValueError, "got stride=(2, -1)"),
    ({"stride": (1, 2, 3)}, ValueError, "stride must be an int or 2 ints, one a spatial axis"),
    ({"stride": 1.5}, TypeError, "stride must be an integer, got 1.5"),
    ({"stride": True}, TypeError, "stride must be an integer, got True"),
    ({"stride": "2"}, TypeError, "stride must be an integer, got '2'"),
    ({"stride": 2**31}, ValueError, "at most 2**30, got stride=2147483648"),
    ({"dilation": 0}, ValueError, "dilation must be positive"),
    ({"padding": -1}, ValueError, "padding must be non-negative"),
    ({"padding": ((1, 2), 3)}, ValueError,
     "padding must be an int, 2 ints or 2 pairs (before, after)"),
    ({"padding": ((1, 2, 3), (1, 2, 3))}, ValueError, "got padding=((1, 2, 3), (1, 2, 3))"),
    ({"padding": ((0, 2**31), (0, 0))}, ValueError, "padding must lie within +-2**30"),
    ({"padding": "SAME"}, TypeError, "padding must be an int, ints or pairs of ints, got 'SAME'"),
    ({"padding": 9}, ValueError, "the output would have a negative size, (-11, -10)"),
    ({"output_padding": 2, "stride": 2}, ValueError,
     "output_padding must be smaller than stride or dilation"),
    ({"output_padding": 1}, ValueError,
     "got output_padding=(1, 1), stride=(1, 1), dilation=(1, 1)"),
    ({"output_padding": -1}, ValueError, "output_padding must be non-negative"),
    ({"output_size": (7, 9)}, ValueError, "output_size must lie from (7, 8) to (7, 8), got (7, 9)"),
    ({"output_size": (6, 8)}, ValueError, "got (6, 8)"),
    ({"output_size": (7,)}, ValueError, "output_size must have 2 sizes, got output_size=(7,)"),
    ({"output_size": (12, 14), "stride": 2, "output_padding": 1}, ValueError, "give one of them"),
    ({"groups": 3}, ValueError, "groups must divide the input channels, but 3 does not divide 4"),
    ({"groups": 0}, ValueError, "groups must be positive, got groups=0"),
    ({"groups": 2.0}, TypeError, "groups must be an integer, got 2.0"),
    ({"data_format": "NDHWC"}, ValueError, "data_format must be one of"),
    ({"precision": "exact"}, ValueError, "got 'exact'"),
    ({"implementation": 3}, TypeError, "implementation must be None or a name"),
    ({"implementation": "fastest"}, ValueError, "implementation='fastest' cannot run the forward"),
    ({"implementation": "cuda"}, ValueError,
     "implementation='cuda' cannot run the forward: this is being lowered for cpu"),
    ({"stride": 2**30 - 1, "dilation": 2**30 - 1}, ValueError,
     "an output size must be at most 2**30"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=lambda v: str(v)[:40])
def test_arguments(arguments, kind, message):
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(kind, match=re.escape(message)) as caught,
    ):
        jaxconv.conv_transpose2d(**({"x": X, "weight": W} | arguments))
    assert "conv" in str(caught.value)  # it says which operation


def test_sizes_that_overflow():
    x = jax.ShapeDtypeStruct((2**20, 2**20, 2, 2), jnp.float32)
    w = jax.ShapeDtypeStruct((2**20, 2**10, 2**10, 2**10), jnp.float32)
    with pytest.raises(ValueError, match=r"the output of shape .* has more than 2\*\*60 elements"):
        jax.eval_shape(lambda x, w: jaxconv.conv_transpose2d(x, w, stride=2**18), x, w)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"rhs": np.ones((3, 3, 4), np.float32)}, ValueError, "1 to 3 spatial axes"),
        ({"rhs": np.ones((3, 3, 5, 2), np.float32)}, ValueError, "rhs must have lhs's 4 features"),
        ({"strides": (2,)}, ValueError, "strides must be an int or 2 ints"),
        ({"strides": (0, 1)}, ValueError, "strides must be positive"),
        ({"padding": "FULL"}, ValueError, "padding must be 'SAME', 'VALID' or pairs, got 'FULL'"),
        ({"padding": (1, 2)}, ValueError, "'SAME', 'VALID' or 2 pairs"),
        ({"rhs_dilation": (0, 1)}, ValueError, "rhs_dilation must be positive"),
        ({"feature_group_count": 0}, ValueError, "feature_group_count must be positive"),
        ({"feature_group_count": 3}, ValueError, "feature_group_count=3"),
    ],
    ids=str,
)
def test_arguments_of_conv_transpose(change, kind, message):
    arguments = {
        "lhs": np.ones((1, 5, 6, 4), np.float32),
        "rhs": np.ones((3, 3, 4, 2), np.float32),
        "strides": (2, 2),
        "padding": "SAME",
    } | change
    with pytest.raises(kind, match=re.escape(message)):
        jaxconv.conv_transpose(**arguments)


# A call of the forward's handler that is right, and what to spoil in it.
SHAPES = {"x": (2, 4, 5), "w": (4, 3, 3), "y": (2, 3, 7)}
ATTRIBUTES = {
    "stride": np.array([1]), "dilation": np.array([1]), "pad": np.array([0]), "groups": 1,
    "stack": 0, "channels_last": 0, "precision": 0, "kernel": "",
}  # fmt: skip


def call(shapes=(), attributes=(), dtype=jnp.float32, extra=(), out_dtype=jnp.float32):
    shapes = SHAPES | dict(shapes)
    operands = [jnp.ones(shapes["x"], dtype), jnp.ones(shapes["w"], jnp.float32), *extra]
    out = jax.ShapeDtypeStruct(shapes["y"], out_dtype)
    return jax.ffi.ffi_call("jaxconv_forward", out)(*operands, **(ATTRIBUTES | dict(attributes)))


def test_handler_when_right(platform):
    np.testing.assert_allclose(call()[0, 0], [4, 8, 12, 12, 12, 8, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {"x": (4, 5)}}, "batch axes"),
        ({"shapes": {"x": (5,)}}, "is not (*stack, *batch, c, *s)"),
        ({"shapes": {"w": (4, 3)}}, "is not (*stack, ci, co/groups, *k)"),
        ({"shapes": {"w": (4, 3, 0)}}, "kernel sizes must be positive"),
        ({"shapes": {"w": (5, 3, 3)}}, "channels of x"),
        ({"shapes": {"y": (2, 4, 7)}}, "channels of x"),
        ({"shapes": {"y": (3, 3, 7)}}, "batch axes of x (2, 4, 5) and y (3, 3, 7) differ"),
        ({"attributes": {"groups": 0}}, "groups must be positive, got 0"),
        ({"attributes": {"groups": 3}}, "do not agree for groups=3"),
        ({"attributes": {"stride": np.array([0])}}, "stride must be positive"),
        ({"attributes": {"stride": np.array([2**40])}}, "stride must be positive"),
        ({"attributes": {"stride": np.array([1, 1])}}, "one value an axis"),
        ({"attributes": {"stride": np.zeros(0, np.int64)}}, "stride must have 1 to 3 values"),
        ({"attributes": {"dilation": np.array([-1])}}, "dilation must be positive"),
        ({"attributes": {"pad": np.array([2**62])}}, "pad must lie within"),
        ({"attributes": {"stack": -1}}, "stack must not be negative"),
        ({"attributes": {"stack": 1}}, "is not"),
        ({"attributes": {"channels_last": 2}}, "channels_last must be 0 or 1"),
        ({"attributes": {"precision": 7}}, "precision must be 0 or 1"),
        ({"attributes": {"kernel": "none"}}, "no kernel named none takes the problem"),
        ({"dtype": jnp.float16}, "operands must both be"),
        ({"out_dtype": jnp.int32}, "operands must both be"),
        ({"out_dtype": jnp.float64}, "the result must have the operands' type"),
        ({"extra": (np.ones(4, np.float32),)}, "a bias of shape (4) is not"),
        ({"extra": (np.ones(3, np.float64),)}, "is not (*stack, co) in the result's type"),
        ({"extra": (np.ones(3, np.float32),) * 2}, "wrong number of operands: 4"),
    ],
    ids=str,
)  # fmt: skip
def test_handler_when_wrong(platform, change, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
        jax.block_until_ready(call(**change))


def test_version_guard(monkeypatch):
    module = ffi.module("cpu")
    ffi._check_version(module)
    monkeypatch.setattr(ffi, "_runtime_api_version", lambda: (0, 1))
    with pytest.raises(ImportError, match=r"built with XLA FFI 0\.\d+, but jaxlib .* has 0\.1"):
        ffi._check_version(module)
    monkeypatch.setattr(ffi, "__version__", "99.0")
    with pytest.raises(ImportError, match="install it again"):
        ffi._check_version(module)


def test_built_with_the_oldest_headers():
    """Newer headers would refuse to load in the oldest jaxlib that pyproject.toml names."""
    for platform in ffi.built_platforms():
        assert ffi.module(platform).XLA_FFI_API_VERSION == (0, 3)
