"""Transposed convolutions of an input that is divided over devices along a spatial axis.

For volumes that one device cannot hold. The functions are called inside jax.shard_map, by every
device, with its part of the input; devices send their neighbours the few elements beside the cut
that reach across it, the halo, and nothing else, in the forward and in both gradients.

On the divided axis, with s the stride, p the padding before, k taps of dilation d, and parts of i
inputs, device r has the inputs from r*i on and computes the outputs from r*s*i on. Input j of its
own numbering reaches the outputs j*s - p ... j*s - p + d*(k - 1). So what reaches into a part from
before it are (d*(k - 1) - p) // s inputs, and from after it, ceil(p / s).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxconv import api, primitive
from jaxconv import spec as specs
from jaxconv.api import IntOrInts, Padding
from jaxconv.spec import ConvSpec

_DOC = """jaxconv.{op} of an input of which each device has a part, inside jax.shard_map.

Args:
  x: this device's part of the input, (N, C_in, {letters}) or, channels last, (N, {letters}, C_in).
    All parts have one size, and those of consecutive devices follow one another.
  weight, bias: the whole of them, on every device.
  stride, padding, output_padding, groups, dilation: those of the whole.
  axis_name: name of the mesh axis that the input is divided along.
  spatial_axis: which spatial axis is divided; 0, the default, is the first one.
  size: the whole input's size along it, where that is less than all parts together: what lies
    beyond it is taken for zero. Default: the size of all parts together.
  data_format, output_size, precision, preferred_element_type, implementation: as in jaxconv.{op}.

Returns:
  This device's part of the output. Along the divided axis all parts together may be longer than
  the output, and hold zeros beyond it: each has stride times the input's part or, if that is not
  enough, the least multiple of the stride that is.

Raises:
  TypeError, ValueError: as in jaxconv.{op}.

Results are those of jaxconv.{op} on the whole input, to the bit if the same kernels are chosen.
Replicated weights get the gradient of all devices together, as anything has in shard_map.

Example:
  >>> import functools, jax, jax.numpy as jnp, jaxconv
  >>> from jax.sharding import PartitionSpec as P
  >>> mesh = jax.sharding.Mesh(jax.devices(), "z")
  >>> up = functools.partial(jaxconv.spatial.{op}, stride=2, padding=1, output_padding=1)
  >>> up = jax.shard_map(
  ...     functools.partial(up, axis_name="z"), mesh=mesh,
  ...     in_specs=(P(None, None, "z"), P()), out_specs=P(None, None, "z"))
  >>> i = 4 * jax.device_count()
  >>> x, w = jnp.ones((1, 8, i{ones})), jnp.ones({w_shape})
  >>> jax.jit(up)(x, w).shape == (1, 3, 2 * i{twos})
  True
"""


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _neighbours(x: jax.Array, dim: int, count: int, name: str, devices: int, side: int):
    """The `count` elements that lie before (side -1) or after (side 1) a device's part, with zeros
    beyond the first and the last part. Farther neighbours are asked where one part is too short."""
    part = x.shape[dim]
    pieces, hop = [], 1
    while count > 0 and hop < devices:
        n = min(count, part)
        piece = lax.slice_in_dim(x, part - n if side < 0 else 0, part if side < 0 else n, axis=dim)
        pairs = [(r + side * hop, r) for r in range(devices) if 0 <= r + side * hop < devices]
        pieces.append(lax.ppermute(piece, name, pairs))
        count, hop = count - n, hop + 1
    if count > 0:
        zeros = lax.slice_in_dim(x, 0, 1, axis=dim) * 0
        pieces.append(jnp.broadcast_to(zeros, (*x.shape[:dim], count, *x.shape[dim + 1 :])))
    return lax.concatenate(pieces[::side], dim)


def _zero_beyond(part: jax.Array, dim: int, size: int, name: str, devices: int) -> jax.Array:
    """A device's part with zeros where all parts together go beyond `size`."""
    n = part.shape[dim]
    beyond = min(n, devices * n - size)
    if beyond <= 0:
        return part
    tail = lax.slice_in_dim(part, n - beyond, n, axis=dim)
    index = (
        lax.axis_index(name) * n + (n - beyond) + lax.broadcasted_iota(jnp.int32, tail.shape, dim)
    )
    tail = jnp.where(index < size, tail, jnp.zeros_like(tail))
    return lax.dynamic_update_slice_in_dim(part, tail, n - beyond, dim)


def _forward(
    x: jax.Array, w: jax.Array, bias: jax.Array | None, spec: ConvSpec, axis: int, name: str
) -> jax.Array:
    """This device's part of the output; `spec` is that of the whole."""
    devices = lax.axis_size(name)
    dim = x.ndim - spec.rank - (1 if spec.channels_last else 0) + axis
    part, out_size = x.shape[dim], spec.out_size[axis]
    s, p, d = spec.stride[axis], spec.padding[axis], spec.dilation[axis]
    reach = d * (spec.kernel_size[axis] - 1)

    def on_axis(values: specs.Sizes, value: int) -> specs.Sizes:
        return (*values[:axis], value, *values[axis + 1 :])

    def local(inputs: jax.Array, outputs: int, padding: int, bias: jax.Array | None) -> jax.Array:
        return primitive.forward(
            inputs,
            w,
            bias,
            spec.replace(
                in_size=on_axis(spec.in_size, inputs.shape[dim]),
                out_size=on_axis(spec.out_size, outputs),
                padding=on_axis(spec.padding, padding),
            ),
        )

    def neighbours(count: int, side: int) -> list[jax.Array]:
        return [_neighbours(x, dim, count, name, devices, side)] if count > 0 else []

    x = _zero_beyond(x, dim, spec.in_size[axis], name, devices)
    # Parts of the output are stride times those of the input or, where the output is longer than
    # that, the least multiple of the stride that is enough.
    blocks = part if devices * s * part >= out_size else _ceil(out_size, s * devices)
    out_part = s * blocks
    before, after = max(0, (reach - p) // s), max(0, _ceil(p, s))  # the halos where blocks == part
    # The outputs next to a cut, to which halos reach, and the inputs of this part that they need.
    first_outputs, last_outputs = max(0, reach - p - s + 1) if before else 0, max(0, p)
    first_inputs = (first_outputs - 1 + p) // s + 1
    last_inputs = part - _ceil(out_part - last_outputs + p - reach, s)
    apart = first_outputs + last_outputs <= out_part and max(first_inputs, last_inputs) <= part
    if blocks == part and apart:
        # They are computed apart and put in their places, over what this part's inputs alone give
        # there: so x and y are not copied, and the halos travel while the rest is computed.
        y = local(x, out_part, p, bias)
        if before > 0:
            inputs = lax.slice_in_dim(x, 0, max(0, first_inputs), axis=dim)
            inputs = lax.concatenate([*neighbours(before, -1), inputs], dim)
            edge = local(inputs, first_outputs, p + before * s, bias)
            y = lax.dynamic_update_slice_in_dim(y, edge, 0, dim)
        if after > 0:
            first = part - max(0, last_inputs)
            inputs = lax.slice_in_dim(x, first, part, axis=dim)
            inputs = lax.concatenate([inputs, *neighbours(after, 1)], dim)
            start = out_part - last_outputs
            edge = local(inputs, last_outputs, p + start - first * s, bias)
            y = lax.dynamic_update_slice_in_dim(y, edge, start, dim)
    else:
        # Each part needs a window of inputs, which, where blocks are more than a part's inputs,
        # lies farther on from device to device.
        first = -((reach - p) // s)
        window = max(1, blocks + (p - 1) // s - first + 1)
        starts = [r * (blocks - part) + first for r in (0, devices - 1)]
        before = max(0, *(-start for start in starts))
        after = max(0, *(start + window - part for start in starts))
        x = lax.concatenate([*neighbours(before, -1), x, *neighbours(after, 1)], dim)
        start = lax.axis_index(name) * (blocks - part) + (first + before)
        x = lax.dynamic_slice_in_dim(x, start, window, dim)
        y = local(x, out_part, p - first * s, bias)
    return _zero_beyond(y, dim, out_size, name, devices)


def _conv_transpose(
    rank: int, axis_name: str, spatial_axis: int, size: int | None, x: ArrayLike, *arguments
) -> jax.Array:
    op = f"spatial.conv_transpose{rank}d"
    x = jnp.asarray(x)
    axis = specs.as_int(op, "spatial_axis", spatial_axis)
    if not 0 <= axis < rank:
        raise specs.error(op, f"spatial_axis must be from 0 to {rank - 1}, got {axis}")
    last = specs.channels_last(op, arguments[7], rank)
    _, _, part = specs.split_shape(op, "x", x.shape, rank, last)
    most = part[axis] * lax.axis_size(axis_name)
    whole = most if size is None else specs.as_int(op, "size", size)
    if not 0 < whole <= most:
        raise specs.error(
            op,
            f"size must be positive and at most what all parts have together, {most}, got {whole}",
        )
    x, w, bias, spec = api.prepare(op, rank, x, *arguments, whole=(axis, whole))
    with jax.named_scope(f"jaxconv.{op}"):
        return _forward(x, w, bias, spec, axis, axis_name)


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
    axis_name: str,
    spatial_axis: int = 0,
    size: int | None = None,
    data_format: str = "channels_first",
    output_size: Sequence[int] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    return _conv_transpose(
        1, axis_name, spatial_axis, size, x, weight, bias, stride, padding, output_padding, groups,
        dilation, data_format, output_size, precision, preferred_element_type, implementation,
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
    axis_name: str,
    spatial_axis: int = 0,
    size: int | None = None,
    data_format: str = "channels_first",
    output_size: Sequence[int] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    return _conv_transpose(
        2, axis_name, spatial_axis, size, x, weight, bias, stride, padding, output_padding, groups,
        dilation, data_format, output_size, precision, preferred_element_type, implementation,
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
    axis_name: str,
    spatial_axis: int = 0,
    size: int | None = None,
    data_format: str = "channels_first",
    output_size: Sequence[int] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    return _conv_transpose(
        3, axis_name, spatial_axis, size, x, weight, bias, stride, padding, output_padding, groups,
        dilation, data_format, output_size, precision, preferred_element_type, implementation,
    )  # fmt: skip


for _rank, _function in enumerate((conv_transpose1d, conv_transpose2d, conv_transpose3d), 1):
    _letters = ["D", "H", "W"][3 - _rank :] if _rank > 1 else ["L"]
    _function.__doc__ = _DOC.format(
        op=_function.__name__,
        letters=", ".join(_letters),
        w_shape=(8, 3, *(3,) * _rank),
        ones=", 6" * (_rank - 1),
        twos=", 12" * (_rank - 1),
    )
