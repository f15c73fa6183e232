"""The static parameters of a transposed convolution: all shape arithmetic and all argument errors.

Nothing here knows JAX. The letters are those of the whole project: n batch, ci and co channels,
g groups, i input sizes, o output sizes, and on each spatial axis k kernel size, s stride, p
padding, op output padding, d dilation, t a tap of the kernel:

    o = i * s - p + t * d                                  where tap t carries input i to
    (i - 1) * s - p_before - p_after + d * (k - 1) + op + 1    how many outputs there are

Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", relationship 14,
https://arxiv.org/abs/1603.07285, with PyTorch's output padding.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Sizes = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]

# What the kernels index with: see kMaxValue and kMaxElements in csrc/ffi_common.cc.
MAX_VALUE = 2**30
MAX_ELEMENTS = 2**60

MAX_AXES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class ConvSpec:
    """Everything static about one of the three operations, as one hashable parameter.

    With x (*stack, *batch, ci, *i), w (*stack, ci, co // g, *k) and y (*stack, *batch, co, *o), or
    channels last (..., *i, ci) and (..., *o, co), the trilinear form is

        T(x, w, y) = sum of x[n, ci, i] * w[ci, co, t] * y[n, co, i * s - p + t * d]

    Several output sizes share one input size when s > 1, so both are kept and neither is inferred.
    """

    in_size: Sizes
    out_size: Sizes
    kernel_size: Sizes
    stride: Sizes
    padding: Sizes
    """p before each axis; what comes after it shows in out_size alone."""
    dilation: Sizes
    groups: int
    channels_last: bool
    stack: int
    """Leading axes, of x, w and y alike, along which whole problems are stacked by vmap. An operand
    of size 1 along one of them is shared by all problems."""
    precision: Any
    """As jax.lax canonicalises it."""
    out_dtype: Any
    """Type of the result; None for that of the operands."""
    implementation: str | None

    @property
    def rank(self) -> int:
        return len(self.stride)

    def lax_padding(self) -> Pads:
        """Padding of the stride-dilated input under which a forward correlation with the flipped
        kernel gives the same: (d * (k - 1) - p) before, and after it what out_size leaves."""
        pads = []
        for i, o, k, s, p, d in zip(
            self.in_size,
            self.out_size,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        ):
            before = d * (k - 1) - p
            pads.append((before, o - dilated_size(i, s) - before + d * (k - 1)))
        return tuple(pads)

    def replace(self, **changes: Any) -> "ConvSpec":
        return dataclasses.replace(self, **changes)


def dilated_size(size: int, dilation: int) -> int:
    """The length of `size` elements that lie `dilation` apart."""
    return max(0, (size - 1) * dilation + 1)


def output_size(
    i: int, k: int, s: int, pads: tuple[int, int], d: int, output_padding: int = 0
) -> int:
    """The output size on one axis; negative where the padding cuts off more than there is."""
    return (i - 1) * s - sum(pads) + d * (k - 1) + output_padding + 1


# ---------------------------------------------------------------------------------------------
# Arguments. Each function takes the operation's name `op` for its errors.


def error(op: str, rule: str) -> ValueError:
    return ValueError(f"{op}: {rule}")


def as_int(op: str, name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None


def per_axis(op: str, name: str, value: Any, rank: int, least: int) -> Sizes:
    """An int, or one int an axis, as one int an axis of at least `least`."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        values = tuple(as_int(op, name, v) for v in value)
    else:
        values = (as_int(op, name, value),) * rank
    if len(values) != rank:
        raise error(
            op, f"{name} must be an int or {rank} ints, one a spatial axis, got {name}={value!r}"
        )
    if any(v < least or v > MAX_VALUE for v in values):
        rule = "positive" if least == 1 else "non-negative"
        raise error(op, f"{name} must be {rule} and at most 2**30, got {name}={value!r}")
    return values


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def per_axis_pads(op: str, value: Any, rank: int) -> Pads:
    """An int, one int an axis, or one pair (before, after) an axis. Only pairs may be negative."""
    if isinstance(value, str):
        raise TypeError(f"{op}: padding must be an int, ints or pairs of ints, got {value!r}")
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    if not any(isinstance(v, Iterable) for v in values):
        return tuple((p, p) for p in per_axis(op, "padding", value, rank, 0))
    if len(values) != rank or not all(_is_pair(v) for v in values):
        raise error(
            op,
            f"padding must be an int, {rank} ints or {rank} pairs (before, after), "
            f"got padding={value!r}",
        )
    pads = tuple((as_int(op, "padding", a), as_int(op, "padding", b)) for a, b in values)
    if any(abs(p) > MAX_VALUE for pair in pads for p in pair):
        raise error(op, f"padding must lie within +-2**30, got padding={value!r}")
    return pads


def channels_last(op: str, data_format: Any, rank: int) -> bool:
    """Reads "channels_first", "channels_last", or letters such as "NCDHW" and "NDHWC"."""
    letters = "DHW"[MAX_AXES - rank :]
    names = {
        "channels_first": False,
        "channels_last": True,
        f"NC{letters}": False,
        f"N{letters}C": True,
    }
    if rank == 1:
        names |= {"NCL": False, "NLC": True}
    if not isinstance(data_format, str) or data_format not in names:
        raise error(op, f"data_format must be one of {sorted(names)}, got {data_format!r}")
    return names[data_format]


def check_weight(
    op: str, x_channels: int, w_shape: Sizes, groups: Any, *, weight: str = "weight"
) -> int:
    """Checks groups against the channels; returns groups."""
    groups = as_int(op, "groups", groups)
    if groups < 1:
        raise error(op, f"groups must be positive, got groups={groups}")
    if x_channels % groups != 0:
        raise error(
            op, f"groups must divide the input channels, but {groups} does not divide {x_channels}"
        )
    if w_shape[0] != x_channels:
        raise error(
            op,
            f"{weight} must have the input's channels first, (C_in, C_out/groups, *kernel): "
            f"the input has {x_channels} channels, {weight} has shape {w_shape}",
        )
    if any(k < 1 or k > MAX_VALUE for k in w_shape[2:]):
        raise error(op, f"kernel sizes must be positive and at most 2**30, got shape {w_shape}")
    return groups


def check_out_size(op: str, size: Sizes, why: str) -> Sizes:
    if any(o < 0 for o in size):
        raise error(op, f"the output would have a negative size, {size}: {why}")
    if any(o > MAX_VALUE for o in size):
        raise error(op, f"an output size must be at most 2**30, got {size}: {why}")
    return size


def check_elements(op: str, name: str, shape: Sequence[Any]) -> None:
    """Refuses arrays whose number of elements would overflow; symbolic sizes are let through."""
    if math.prod(d for d in shape if isinstance(d, int)) > MAX_ELEMENTS:
        raise error(op, f"{name} of shape {tuple(shape)} has more than 2**60 elements")


def split_shape(
    op: str, name: str, shape: Sequence[Any], rank: int, last: bool
) -> tuple[tuple[Any, ...], int, Sizes]:
    """An activation's shape as (batch axes, channels, spatial sizes)."""
    shape = tuple(shape)
    if len(shape) not in (rank + 1, rank + 2):
        layout = "*s, C" if last else "C, *s"
        raise error(
            op,
            f"{name} must have {rank + 2} axes (N, {layout}), or {rank + 1} without a batch, "
            f"got shape {shape}",
        )
    batch = shape[: len(shape) - rank - 1]
    rest = shape[len(batch) :]
    try:
        sizes = tuple(operator.index(d) for d in rest)
    except TypeError:
        raise error(
            op, f"channels and spatial sizes of {name} must be constants, got shape {shape}"
        ) from None
    channels, spatial = (sizes[-1], sizes[:-1]) if last else (sizes[0], sizes[1:])
    if any(i > MAX_VALUE for i in spatial):
        raise error(op, f"spatial sizes of {name} must be at most 2**30, got shape {shape}")
    return batch, channels, spatial


def torch_out_size(
    op: str,
    in_size: Sizes,
    kernel_size: Sizes,
    stride: Sizes,
    pads: Pads,
    dilation: Sizes,
    output_padding: Any,
    wanted: Any,
) -> Sizes:
    """The output's spatial sizes from output_padding or, as in torch.nn.ConvTranspose3d, from
    output_size, of which those that a stride allows are least ... least + stride - 1."""
    rank = len(in_size)
    extra = per_axis(op, "output_padding", output_padding, rank, 0)
    least = tuple(map(output_size, in_size, kernel_size, stride, pads, dilation))
    numbers = (
        f"input {in_size}, kernel {kernel_size}, stride {stride}, padding {pads}, "
        f"dilation {dilation}"
    )
    if wanted is not None:
        if any(extra):
            raise error(
                op,
                f"output_size={wanted!r} and output_padding={output_padding!r} say the same "
                "thing: give one of them",
            )
        sizes = tuple(as_int(op, "output_size", v) for v in wanted)[-rank:]
        if len(tuple(wanted)) not in (rank, rank + 2):
            raise error(op, f"output_size must have {rank} sizes, got output_size={wanted!r}")
        for size, low, s in zip(sizes, least, stride, strict=True):
            if not low <= size < low + s:
                most = tuple(low + s - 1 for low, s in zip(least, stride, strict=True))
                raise error(
                    op, f"output_size must lie from {least} to {most}, got {sizes}: {numbers}"
                )
        return check_out_size(op, sizes, numbers)
    for e, s, d in zip(extra, stride, dilation, strict=True):
        if e >= max(s, d):
            raise error(
                op,
                "output_padding must be smaller than stride or dilation, got "
                f"output_padding={extra}, stride={stride}, dilation={dilation}",
            )
    sizes = tuple(low + e for low, e in zip(least, extra, strict=True))
    return check_out_size(op, sizes, f"{numbers}, output_padding {extra}")


def lax_pads(
    op: str,
    padding: Any,
    kernel_size: Sizes,
    stride: Sizes,
    dilation: Sizes,
    consistent: bool,
) -> Pads:
    """Padding of jax.lax.conv_transpose as padding (before, after) of this module.

    There the padding is added to the dilated input, so that p = d * (k - 1) - padding; with
    use_consistent_padding pairs already mean p. The strings are those of the forward convolution
    whose gradient this is: 'VALID' keeps every output that hears an input and pads up to i * s,
    'SAME' gives i * s outputs.
    """
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise error(op, f"padding must be 'SAME', 'VALID' or pairs, got {padding!r}")
        pads = []
        for k, s, d in zip(kernel_size, stride, dilation, strict=True):
            reach = d * (k - 1)
            if padding == "SAME":
                total = reach + s - 1
                before = reach if s > reach else math.ceil(total / 2)
            else:
                total = reach + s - 1 + max(reach + 1 - s, 0)
                before = reach
            pads.append((reach - before, reach - (total - before)))
        return tuple(pads)
    values = tuple(padding) if isinstance(padding, Iterable) else (padding,)
    if len(values) != len(stride) or not all(_is_pair(v) for v in values):
        raise error(
            op,
            f"padding must be 'SAME', 'VALID' or {len(stride)} pairs (before, after), "
            f"got {padding!r}",
        )
    pairs = per_axis_pads(op, values, len(stride))
    if consistent:
        return pairs
    return tuple(
        (d * (k - 1) - a, d * (k - 1) - b)
        for (a, b), k, d in zip(pairs, kernel_size, dilation, strict=True)
    )


# ---------------------------------------------------------------------------------------------
# Shapes of the three arrays under a spec.

Role = Literal["x", "w", "y"]


def widest(*dtypes: Any) -> Any:
    """The dtype with the most bytes: of an operand's and that of the sums asked for."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def channel_axis(shape: Sequence[Any], spec: ConvSpec) -> int:
    """The axis of the channels in x or y."""
    return len(shape) - 1 if spec.channels_last else len(shape) - 1 - spec.rank


def _channels(shape: Sequence[Any], spec: ConvSpec) -> Any:
    return shape[channel_axis(shape, spec)]


def broadcast_stacks(a: Sequence[Any], b: Sequence[Any], spec: ConvSpec) -> tuple[Any, ...]:
    """The result's stack axes: each as the operands have it, of which one may have 1."""
    for m, n in zip(a[: spec.stack], b[: spec.stack], strict=True):
        if m != n and 1 not in (m, n):
            raise ValueError(f"jaxconv: stack axes of {tuple(a)} and {tuple(b)} differ")
    return tuple(n if m == 1 else m for m, n in zip(a[: spec.stack], b[: spec.stack], strict=True))


def result_shape(
    result: Role, a: Sequence[Any], b: Sequence[Any], spec: ConvSpec
) -> tuple[Any, ...]:
    """The shape of x, w or y from those of the other two, in the order x before w, y before w and
    x before y in which the three operations take them."""
    stack = broadcast_stacks(a, b, spec)
    if result == "w":
        cig = _channels(a, spec)
        return (*stack, cig, _channels(b, spec) // spec.groups, *spec.kernel_size)
    ci, cog = b[spec.stack], b[spec.stack + 1]
    batch = tuple(a[spec.stack : len(a) - 1 - spec.rank])
    channels, sizes = (cog * spec.groups, spec.out_size) if result == "y" else (ci, spec.in_size)
    rest = (*sizes, channels) if spec.channels_last else (channels, *sizes)
    return (*stack, *batch, *rest)
