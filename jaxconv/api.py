"""The public functions: arguments to spec to primitive."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxconv import primitive
from jaxconv import spec as specs
from jaxconv.spec import ConvSpec, error

IntOrInts = int | Sequence[int]
Padding = int | Sequence[int] | Sequence[tuple[int, int]]

_DOC = """{rank}D transposed convolution, with the meaning of torch.nn.functional.{op}.

On each spatial axis, tap t of the kernel carries input i to output o = i*s - p + t*d:

    y[n, co, o] = bias[co] + sum of x[n, ci, i] * weight[ci, co, t]

over all i and t that meet in o and the input channels ci in the group of co, with s the stride,
p the padding and d the dilation. The output's size on each axis is

    (i - 1)*s - p_before - p_after + d*(k - 1) + output_padding + 1

Args:
  x: input, (N, C_in, {letters}) or, channels last, (N, {letters}, C_in); N may be absent.
    float32, bfloat16, float16 and float64 run on jaxconv's own kernels (on CPUs and CUDA devices),
    any other dtype that jax.lax convolves runs through jax.lax.
  weight: (C_in, C_out/groups, {kernel}) in either layout, of x's dtype: that of PyTorch.
  bias: (C_out,), of x's dtype or the result's; None adds nothing.
  stride: distance between the outputs of neighbouring inputs; an int or one an axis. Default 1.
  padding: how much of the full output is cut off at either end: an int, one an axis, or one pair
    (before, after) an axis; pairs may be negative, which adds. Default 0.
  output_padding: how many outputs to add at the end, since for stride > 1 several output sizes
    have the same input size; less than the larger of stride and dilation. Default 0.
  groups: number of groups that channels are divided into; must divide C_in. Default 1.
  dilation: distance between taps of the kernel; an int or one an axis. Default 1.
  data_format: "channels_first" (default; or "NC{letters_joined}") or "channels_last" (or
    "N{letters_joined}C"). Both are native: neither is transposed to the other.
  output_size: the output's spatial sizes, in place of output_padding, as in
    torch.nn.ConvTranspose{rank}d; sizes of N and C before them are ignored, as there.
  precision: as in jax.lax.conv_general_dilated; None follows jax_default_matmul_precision. On a
    GPU float32 products are rounded to TF32 unless it is HIGHEST ("float32"); on a CPU never.
  preferred_element_type: dtype of the result; products are summed in it, or in float32 if that is
    wider. Default: x's dtype.
  implementation: None chooses and always works. "cuda" or "cpu" forces jaxconv's kernels for that
    platform, "xla" forces jax.lax, any other name a kernel so called; where what is forced
    cannot run there is a ValueError, at the latest when the function is compiled.

Returns:
  y, (N, C_out, *o) or, channels last, (N, *o, C_out); without N where x has none. It can be
  differentiated by x, weight and bias to any order, and the results are the same bits in every run.

Raises:
  TypeError: dtypes that differ, or arguments of the wrong type.
  ValueError: shapes and values that do not fit; the message names the argument, the rule and the
    values.

Source: https://arxiv.org/abs/1603.07285, relationship 14, with the output padding of
https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose3d.html.

Example:
  >>> import jax.numpy as jnp, jaxconv
  >>> x, w = jnp.ones({x_shape}), jnp.ones({w_shape})
  >>> jaxconv.{op}(x, w, stride=2, padding=1, output_padding=1, groups=4).shape
  {y_shape}
"""


def _check_dtypes(op: str, x: jax.Array, w: jax.Array, names: tuple[str, str]) -> None:
    if x.dtype != w.dtype:
        raise TypeError(
            f"{op}: {names[0]} and {names[1]} must have one dtype, got {x.dtype} and {w.dtype}"
        )


def _result_dtype(x: jax.Array, preferred: DTypeLike | None) -> np.dtype | None:
    """preferred_element_type where it differs from x's dtype."""
    if preferred is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(preferred)
    return None if dtype == x.dtype else dtype


def _canonical_precision(op: str, precision: Any) -> Any:
    """As jax.lax takes it: names, a Precision, a pair of them, or a preset for dot products."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        if precision is None:
            return None
    presets = lax.DotAlgorithmPreset
    if isinstance(precision, presets):
        return precision
    if isinstance(precision, str) and precision in presets.__members__:
        return presets[precision]
    pair = (precision, precision)
    if isinstance(precision, Sequence) and not isinstance(precision, str):
        pair = tuple(precision)
    try:
        first, second = (lax.Precision(p) for p in pair)
    except (TypeError, ValueError):
        raise error(
            op,
            "precision must be None, a jax.lax.Precision or its name, a pair of them, or a "
            f"jax.lax.DotAlgorithmPreset, got {precision!r}",
        ) from None
    return first, second


def _check_implementation(op: str, implementation: Any) -> None:
    if implementation is not None and not isinstance(implementation, str):
        raise TypeError(
            f"{op}: implementation must be None or a name, got implementation={implementation!r}"
        )


def prepare(
    op: str,
    rank: int,
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    stride: IntOrInts,
    padding: Padding,
    output_padding: IntOrInts,
    groups: int,
    dilation: IntOrInts,
    data_format: str,
    output_size: Sequence[int] | None,
    precision: lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
    implementation: str | None,
    whole: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, ConvSpec]:
    """The operands as arrays, and the problem's spec. With `whole` x is a part of the input along
    one spatial axis: `whole` is that axis, and the size of all parts together."""
    x, w = jnp.asarray(x), jnp.asarray(weight)
    _check_dtypes(op, x, w, ("x", "weight"))
    _check_implementation(op, implementation)
    last = specs.channels_last(op, data_format, rank)
    batch, ci, in_size = specs.split_shape(op, "x", x.shape, rank, last)
    if whole is not None:
        axis, size = whole
        in_size = (*in_size[:axis], size, *in_size[axis + 1 :])
    if w.ndim != rank + 2:
        raise error(
            op, f"weight must have {rank + 2} axes (C_in, C_out/groups, *kernel), got {w.shape}"
        )
    groups = specs.check_weight(op, ci, w.shape, groups)
    if any(i == 0 for i in in_size):
        raise error(op, f"x must have no spatial axis of size 0, got shape {x.shape}")
    strides = specs.per_axis(op, "stride", stride, rank, 1)
    dilations = specs.per_axis(op, "dilation", dilation, rank, 1)
    pads = specs.per_axis_pads(op, padding, rank)
    kernel_size = w.shape[2:]
    out_size = specs.torch_out_size(
        op, in_size, kernel_size, strides, pads, dilations, output_padding, output_size
    )
    co = w.shape[1] * groups
    specs.check_elements(op, "the output", (*batch, co, *out_size))
    spec = ConvSpec(
        in_size=in_size,
        out_size=out_size,
        kernel_size=kernel_size,
        stride=strides,
        padding=tuple(before for before, _ in pads),
        dilation=dilations,
        groups=groups,
        channels_last=last,
        stack=0,
        precision=_canonical_precision(op, precision),
        out_dtype=_result_dtype(x, preferred_element_type),
        implementation=implementation,
    )
    if bias is not None:
        bias = jnp.asarray(bias)
        result = x.dtype if spec.out_dtype is None else spec.out_dtype
        if bias.dtype not in (x.dtype, result):
            raise TypeError(f"{op}: bias must have the dtype {result}, got {bias.dtype}")
        if bias.shape != (co,):
            raise error(
                op,
                f"bias must have one value an output channel, ({co},) for weight {w.shape} and "
                f"groups={groups}, got shape {bias.shape}",
            )
        bias = lax.convert_element_type(bias, result)
    return x, w, bias, spec


def _conv_transpose(rank: int, *arguments: Any) -> jax.Array:
    op = f"conv_transpose{rank}d"
    x, w, bias, spec = prepare(op, rank, *arguments)
    with jax.named_scope(f"jaxconv.{op}"):
        return primitive.forward(x, w, bias, spec)


def conv_transpose1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    data_format: str = "channels_first",
    output_size: Sequence[int] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    return _conv_transpose(
        1, x, weight, bias, stride, padding, output_padding, groups, dilation, data_format,
        output_size, precision, preferred_element_type, implementation,
    )  # fmt: skip


def conv_transpose2d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    data_format: str = "channels_first",
    output_size: Sequence[int] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    return _conv_transpose(
        2, x, weight, bias, stride, padding, output_padding, groups, dilation, data_format,
        output_size, precision, preferred_element_type, implementation,
    )  # fmt: skip


def conv_transpose3d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    data_format: str = "channels_first",
    output_size: Sequence[int] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    return _conv_transpose(
        3, x, weight, bias, stride, padding, output_padding, groups, dilation, data_format,
        output_size, precision, preferred_element_type, implementation,
    )  # fmt: skip


for _rank, _function in enumerate((conv_transpose1d, conv_transpose2d, conv_transpose3d), 1):
    _letters = ["D", "H", "W"][3 - _rank :] if _rank > 1 else ["L"]
    _function.__doc__ = _DOC.format(
        rank=_rank,
        op=_function.__name__,
        letters=", ".join(_letters),
        letters_joined="".join(_letters),
        kernel=", ".join(f"k{letter}" for letter in _letters),
        x_shape=(2, 8, *(6,) * _rank),
        w_shape=(8, 3, *(3,) * _rank),
        y_shape=(2, 12, *(12,) * _rank),
    )


def conv_transpose(
    lhs: ArrayLike,
    rhs: ArrayLike,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    use_consistent_padding: bool = False,
    *,
    feature_group_count: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Transposed convolution with the arguments, layouts and results of jax.lax.conv_transpose.

    It computes jax.lax.conv_general_dilated(lhs, rhs, 1, pads, strides, rhs_dilation), with

        y[n, o, j] = sum of lhs[n, c, i] * rhs[t, c, o],  where  i*s + p = j + t*d

    and p the padding of the dilated input that `padding` stands for.

    Args:
      lhs: input of rank r + 2, with r from 1 to 3 spatial axes.
      rhs: kernel of rank r + 2, of lhs's dtype; with groups its input features are those of one
        group, and its output features all (the other way round under transpose_kernel).
      strides: one int an axis.
      padding: 'SAME' or 'VALID', of the forward convolution whose gradient this would be, or pairs
        of what is added before and after each axis of the dilated input; negative values crop.
      rhs_dilation: one int an axis. Default: 1 for each.
      dimension_numbers: layouts as in jax.lax.conv_general_dilated: three strings, or a
        jax.lax.ConvDimensionNumbers. Default: channels last, kernel (*k, I, O).
      transpose_kernel: flip the kernel's axes and swap its features, as in Keras and PyTorch.
      precision, preferred_element_type, implementation: as in conv_transpose3d.
      use_consistent_padding: read pairs as the padding of the forward convolution, too.
      feature_group_count: number of groups, which jax.lax.conv_transpose has not. Default 1.

    Returns:
      The result, in the output layout of dimension_numbers.

    Raises:
      TypeError, ValueError: as in conv_transpose3d.

    Source: jax.lax.conv_transpose and jax.lax.conv_general_dilated.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> x, w = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
      >>> jaxconv.conv_transpose(x, w, (2, 2), 'SAME', feature_group_count=2).shape
      (1, 16, 16, 6)
    """
    op = "conv_transpose"
    x, w = jnp.asarray(lhs), jnp.asarray(rhs)
    _check_dtypes(op, x, w, ("lhs", "rhs"))
    _check_implementation(op, implementation)
    rank = x.ndim - 2
    if x.ndim != w.ndim or not 1 <= rank <= specs.MAX_AXES:
        raise error(
            op,
            "lhs and rhs must both have 1 to 3 spatial axes beside their two others, got shapes "
            f"{x.shape} and {w.shape}",
        )
    if dimension_numbers is None:
        letters = ("H", "HW", "HWD")[rank - 1]
        dimension_numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    groups = specs.as_int(op, "feature_group_count", feature_group_count)
    if groups < 1:
        raise error(op, f"feature_group_count must be positive, got {groups}")

    # x to (n, ci, *i) or (n, *i, ci), whichever it is nearer to.
    last = numbers.lhs_spec.index(x.ndim - 1) == 1
    order = (0, *range(2, x.ndim), 1) if last else tuple(range(x.ndim))
    x = jnp.transpose(x, [numbers.lhs_spec[axis] for axis in order])
    _, ci, in_size = specs.split_shape(op, "lhs", x.shape, rank, last)

    # w to (ci, co // g, *k). lax's kernel is (*k, ci // g, co) and meets the input flipped; under
    # transpose_kernel it is that of the forward convolution from co to ci, (*k, co // g, ci).
    w = jnp.transpose(w, numbers.rhs_spec)  # (O, I, *k)
    if not transpose_kernel:
        o, i, *k = w.shape
        if o % groups != 0 or i * groups != ci:
            raise error(
                op,
                f"rhs must have lhs's {ci} features divided by feature_group_count={groups} as "
                f"input features, and a multiple of it as output features, got {i} and {o}",
            )
        w = jnp.flip(w.reshape(groups, o // groups, i, *k).swapaxes(1, 2), range(3, rank + 3))
        w = w.reshape(groups * i, o // groups, *k)
    specs.check_weight(op, ci, w.shape, groups, weight="rhs")

    stride = specs.per_axis(op, "strides", strides, rank, 1)
    dilation = specs.per_axis(op, "rhs_dilation", rhs_dilation or (1,) * rank, rank, 1)
    kernel_size = w.shape[2:]
    pads = specs.lax_pads(op, padding, kernel_size, stride, dilation, use_consistent_padding)
    # As in lax, the output of an empty axis is what the padding alone makes it, and none is less
    # than zero.
    out_size = tuple(
        max(0, specs.output_size(i, k, s, p, d) if i > 0 else d * (k - 1) - sum(p))
        for i, k, s, p, d in zip(in_size, kernel_size, stride, pads, dilation, strict=True)
    )
    specs.check_elements(op, "the output", (*x.shape[:1], w.shape[1] * groups, *out_size))
    spec = ConvSpec(
        in_size=in_size,
        out_size=specs.check_out_size(op, out_size, f"padding {pads}"),
        kernel_size=kernel_size,
        stride=stride,
        padding=tuple(before for before, _ in pads),
        dilation=dilation,
        groups=groups,
        channels_last=last,
        stack=0,
        precision=_canonical_precision(op, precision),
        out_dtype=_result_dtype(x, preferred_element_type),
        implementation=implementation,
    )
    with jax.named_scope(f"jaxconv.{op}"):
        y = primitive.forward(x, w, None, spec)
    # y's axis `order.index(role)` is what the output's layout has at `out_spec[role]`.
    back = sorted(range(y.ndim), key=lambda axis: numbers.out_spec[order[axis]])
    return jnp.transpose(y, back)
