"""The one list of problems that tests run on, and the strategy that draws random ones."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxconv.spec import ConvSpec
from oracle import Definition


@dataclasses.dataclass(frozen=True)
class Case:
    """A transposed convolution; sizes one value an axis, padding one pair an axis."""

    n: int
    ci: int
    co: int
    g: int
    i: tuple[int, ...]
    k: tuple[int, ...]
    s: tuple[int, ...]
    p: tuple[tuple[int, int], ...]
    op: tuple[int, ...]
    d: tuple[int, ...]
    name: str = ""

    @property
    def rank(self) -> int:
        return len(self.i)

    @property
    def o(self) -> tuple[int, ...]:
        return tuple(
            (i - 1) * s - a - b + d * (k - 1) + op + 1
            for i, s, (a, b), d, k, op in zip(
                self.i, self.s, self.p, self.d, self.k, self.op, strict=True
            )
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.ci, *self.i)

    @property
    def w_shape(self) -> tuple[int, ...]:
        return (self.ci, self.co // self.g, *self.k)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.n, self.co, *self.o)

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Random x, w, y and bias in float64."""
        rng = np.random.default_rng(seed)
        shapes = (self.x_shape, self.w_shape, self.y_shape, (self.co,))
        x, w, y, bias = (rng.standard_normal(shape) for shape in shapes)
        return x, w, y, bias

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of jaxconv.conv_transpose1d, 2d and 3d."""
        return {
            "stride": self.s,
            "padding": self.p,
            "output_padding": self.op,
            "groups": self.g,
            "dilation": self.d,
        }

    def spec(self, **changes: Any) -> ConvSpec:
        return ConvSpec(
            in_size=self.i,
            out_size=self.o,
            kernel_size=self.k,
            stride=self.s,
            padding=tuple(a for a, _ in self.p),
            dilation=self.d,
            groups=self.g,
            channels_last=False,
            stack=0,
            precision=None,
            out_dtype=None,
            implementation=None,
        ).replace(**changes)

    def definition(self) -> Definition:
        pad = [a for a, _ in self.p]
        return Definition(self.i, self.o, self.k, self.s, pad, self.d, self.g)


def case(
    name: str,
    n: int,
    ci: int,
    co: int,
    g: int,
    i: Any,
    k: Any,
    s: Any = 1,
    p: Any = 0,
    op: Any = 0,
    d: Any = 1,
) -> Case:
    """A case from one value, or one an axis, for each size."""
    rank = len(i)

    def each(v: Any) -> tuple[Any, ...]:
        return tuple(v) if isinstance(v, tuple) else (v,) * rank

    pads = tuple(v if isinstance(v, tuple) else (v, v) for v in each(p))
    return Case(n, ci, co, g, tuple(i), each(k), each(s), pads, each(op), each(d), name)


# fmt: off
CASES = [
    case("one_element", 1, 1, 1, 1, (1,), 1),
    case("one_output_of_many", 1, 3, 2, 1, (1, 1, 1), 3, 1, 1),
    case("odd_1d", 3, 5, 7, 1, (13,), 4, 3, 1, 2),
    case("odd_2d", 2, 3, 5, 1, (7, 9), (3, 2), (2, 3), (1, 0), (1, 0)),
    case("odd_3d", 2, 3, 4, 1, (3, 5, 7), (3, 2, 4), (2, 1, 3), (1, 0, 2), (0, 0, 1)),
    case("empty_phases", 2, 4, 6, 2, (4, 5), 2, 5, 0, 4),
    case("empty_phases_by_dilation", 1, 4, 4, 1, (5, 6), 3, 2, 1, 1, 2),
    case("stride_and_dilation_share_a_factor", 2, 3, 3, 1, (6, 5), 3, 6, 2, 5, 4),
    case("kernel_is_stride", 2, 16, 8, 1, (5, 6, 7), 2, 2),
    case("kernel_is_stride_3", 2, 6, 9, 3, (5, 7), 3, 3),
    case("depthwise_3d", 2, 16, 16, 16, (6, 7, 9), 4, 2, 1),
    case("depthwise_2d", 2, 40, 40, 40, (11, 13), 4, 2, 1),
    case("depthwise_1d", 2, 33, 33, 33, (32,), 6, 3, 2, 1),
    case("depthwise_rows_of_5_vectors", 2, 3, 3, 3, (70,), 7, 1, 3),
    case("depthwise_odd_taps", 1, 5, 5, 5, (5, 6, 17), (3, 2, 5), (2, 1, 2), (1, 0, 2), (1, 0, 1)),
    case("depthwise_crop", 2, 3, 3, 3, (4, 50), (3, 6), (1, 2), (-1, 9), 0, (2, 1)),
    case("depthwise_multiplier", 2, 6, 18, 6, (9, 8), 3, 2, 1, 1),
    case("one_output_channel", 2, 24, 1, 1, (6, 6, 10), 4, 2, 1),
    case("thin_3d", 2, 64, 1, 1, (5, 6, 12), 4, 2, 1),
    case("thin_3d_odd", 1, 40, 3, 1, (4, 5, 7), 3, 2, 1, 1),
    case("thin_2d", 2, 64, 3, 1, (9, 37), 4, 2, 1),
    case("thin_2d_dilated", 2, 20, 2, 1, (7, 11), (3, 5), (1, 2), (2, 3), 0, (2, 3)),
    case("thin_1d", 2, 32, 1, 1, (301,), 7, 1, 3),
    case("thin_1d_stride_8", 1, 32, 2, 1, (300,), 16, 8, 4),
    case("thin_empty_phases", 1, 16, 2, 1, (3, 5, 6), 2, 3, 0, 1),
    case("thin_96_to_2", 1, 96, 2, 1, (6, 10), 3, 1, 1),
    case("one_input_channel", 2, 1, 24, 1, (6, 6, 10), 3, 2, 1, 1),
    case("groups_of_8", 2, 32, 32, 4, (4, 6, 18), 3, 2, 1),
    case("groups_of_12", 2, 24, 36, 2, (4, 6, 18), (3, 5, 3), 2, 1, 1),
    case("dense_64", 1, 64, 64, 1, (17, 19), 3),
    case("dense_70_to_130", 1, 70, 130, 1, (9, 11), 3, 2, 1, 1),
    case("dense_48_to_24", 2, 48, 24, 1, (6, 7, 10), 3, 1, 1),
    case("dense_40_to_200", 2, 40, 200, 1, (9, 11), (3, 4), (2, 1), 1, (1, 0)),
    case("dense_96_kernel_is_stride", 3, 96, 16, 1, (3, 5, 9), 2, 2),
    case("dense_1d", 1, 160, 64, 1, (300,), 8, 4, 2),
    # Whole rows of 16 bytes: channels first, boxes are copied and turned.
    case("dense_rows_both_phases", 2, 48, 72, 1, (3, 5, 16), 3, 2, 1, 1),
    case("dense_rows_one_phase", 2, 32, 40, 1, (10, 16), 3, 2, 2, 1, 2),
    case("dense_rows_in_pieces", 2, 40, 64, 1, (512,), 5, 1, 2),
    case("dense_rows_two_groups", 3, 64, 96, 2, (9, 24), (3, 4), (1, 2), 1),
    case("dense_rows_three_residues", 2, 64, 32, 1, (7, 8), (5, 4), (2, 3), 1, 1),
    # Rows of whole words of two 16-bit elements, copied word by word, of channels first.
    case("dense_twos", 2, 64, 96, 1, (6, 22), 3),
    case("dense_twos_residues", 2, 40, 24, 1, (5, 33), 3, 2, 1, 1),
    case("dense_twos_five_residues", 1, 24, 40, 1, (50,), (3,), (5,), 1, 0, 2),
    case("dense_twos_odd_channels", 3, 27, 16, 1, (4, 70), 3, 1, 1),
    case("dense_twos_long_row", 2, 32, 64, 1, (514,), 3, 1, 1),
    case("dense_twos_two_groups", 3, 48, 80, 2, (3, 5, 10), 3, 1, 1),
    case("fold_7_taps", 2, 32, 16, 1, (3, 5, 9), (2, 3, 7), 1, (0, 1, 3)),
    case("fold_two_rows_of_tiles", 1, 24, 32, 1, (3, 70), 3),
    case("fold_cropped", 3, 40, 24, 1, (5, 133), 3, 1, (0, 2)),
    case("fold_dilated", 2, 16, 16, 1, (7, 61), (2, 5), (2, 1), (1, 3), (1, 0), (1, 3)),
    case("fold_groups", 2, 32, 48, 2, (9, 130), (3, 2), (2, 1), (1, 0)),
    case("blocks_two_chunks", 2, 32, 72, 1, (11, 13), (5, 4), 2, 2, 1),
    case("grouped_3x5x7", 3, 32, 32, 4, (5, 6, 7), (3, 5, 7), 2, (1, 2, 3), 1),
    case("grouped_dilated", 2, 32, 64, 8, (9, 13), (3, 5), (2, 3), (1, 2), 0, (2, 1)),
    case("across_7_taps", 2, 32, 16, 1, (5, 6, 33), (3, 5, 7)),
    case("across_dilated", 1, 48, 48, 1, (4, 7, 20), 3, 1, (1, 2, 3), 0, 2),
    case("across_groups", 2, 32, 64, 4, (11, 37), (3, 5), (2, 3), (1, 2), 0, (2, 1)),
    case("across_24_to_8", 3, 24, 8, 1, (13, 29), 4, 2, 1),
    case("across_40_to_56_pixelwise", 2, 40, 56, 1, (5, 9), 1),
    case("across_sparse_residues", 1, 8, 8, 1, (17, 23), 3, 5, 1, 0, 2),
    case("across_wide", 1, 64, 64, 1, (3, 600), 3, 1, (0, 1)),
    case("across_padded", 2, 32, 32, 1, (3, 5, 50), (3, 2, 5), (1, 1, 3), (1, 2, 5), 0, (1, 3, 2)),
    case("eight_images", 8, 32, 64, 1, (9, 7), 3, 2, 1, 1),
    case("eight_images_groups_of_4", 8, 8, 8, 2, (5, 6), 3, 2, 1),
    case("eight_images_groups_of_8", 8, 16, 32, 2, (3, 5, 6), (2, 3, 3), (1, 2, 1), (0, 1, 1)),
    case("images_that_can_be_cut", 2, 32, 16, 1, (4, 5, 6), 2, 2),
    case("groups_of_32", 2, 64, 96, 2, (4, 5, 9), (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1)),
    case("long_1d", 2, 32, 16, 1, (301,), 16, 8, 4),
    case("dilated_3d", 2, 8, 8, 2, (6, 6, 6), 3, 2, 2, 0, 2),
    case("dilated_1d", 2, 8, 8, 1, (67,), 5, 1, 0, 0, 3),
    case("negative_padding", 2, 4, 4, 1, (5, 6), 3, 2, ((-2, -1), (1, -3))),
    case("padding_beyond_the_kernel", 2, 4, 4, 1, (9, 12), 2, 3, ((5, 7), (4, 0))),
    case("asymmetric_padding", 2, 4, 4, 1, (5, 6, 4), 3, 2, ((0, 2), (2, 1), (1, 0))),
    case("output_of_size_0", 2, 4, 4, 1, (3,), 3, 1, ((2, 3),)),
    case("no_batch", 0, 4, 4, 1, (5, 6), 3, 2, 1),
    case("no_input_channels", 2, 0, 0, 1, (5, 6), 3, 2, 1),
    case("stride_only_along_rows", 2, 8, 8, 1, (3, 5, 33), (1, 1, 4), (1, 1, 2), (0, 0, 1)),
    case("big_kernel", 1, 8, 8, 1, (4, 6, 10), (3, 5, 7), 1, 0),
    case("big_stride_big_kernel", 1, 8, 4, 1, (8, 8), 32, 16),
    case("big_stride_many_channels", 1, 8, 256, 1, (30,), 16, 16),
    case("taps", 1, 40, 7, 1, (9,), 16, 8, 4),
    case("taps_2d", 2, 26, 10, 2, (2, 3), (5, 16), (2, 8), (1, 4), (1, 0)),
    case("taps_3d", 1, 30, 3, 1, (2, 2, 3), (2, 3, 32), (1, 2, 5), (0, -1, 7), 0, (2, 1, 1)),
    case("taps_in_place", 2, 9, 8, 1, (3, 4), (16, 32), 16),
]
# fmt: on

DTYPES = ("float32", "bfloat16", "float16", "float64")


def of(workload: Any) -> Case:
    """A benchmark's workload at its full size."""
    w = workload
    return case(w.name, w.n, w.ci, w.co, w.g, w.i, w.k, w.s, w.p, w.op, w.d)


def shrunk(workload: Any) -> Case:
    """A benchmark's workload on a small volume: the same channels, kernel and strides."""
    most = {1: 70, 2: 14, 3: 6}[len(workload.i)]
    i = tuple(min(size, most + axis) for axis, size in enumerate(workload.i))
    small = dataclasses.replace(of(workload), n=2, i=i)
    if work(small) > 1e8:  # many channels: a smaller volume does
        small = dataclasses.replace(small, n=1, i=tuple(min(size, 3) for size in i))
    return small


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any problem, of bounded work."""
    rank = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    g = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    cig, cog = (draw(st.sampled_from([1, 1, 2, 3, 4, 7, 8, 9, 16, 17])) for _ in range(2))
    most = {1: 40, 2: 12, 3: 7}[rank]
    i, k, s, d = sizes(1, most), sizes(1, 5), sizes(1, 4), sizes(1, 3)
    op = tuple(draw(st.integers(0, max(a, b) - 1)) for a, b in zip(s, d, strict=True))
    p = []
    for axis in range(rank):
        full = (i[axis] - 1) * s[axis] + d[axis] * (k[axis] - 1) + op[axis] + 1
        before = draw(st.integers(-2, max(full - 1, 0)) if draw(st.booleans()) else st.just(0))
        after = draw(st.integers(-2, max(full - before, 0)) if draw(st.booleans()) else st.just(0))
        p.append((min(before, full), min(after, full - before)))
    return Case(draw(st.integers(1, 3)), g * cig, g * cog, g, i, k, s, tuple(p), op, d)


def last(a: Any, rank: int) -> Any:
    """Channels first to channels last, of an array whose last axes are (c, *s)."""
    return jnp.moveaxis(a, -1 - rank, -1)


def first(a: Any, rank: int) -> Any:
    """Channels last to channels first."""
    return jnp.moveaxis(a, -1, -1 - rank)


def work(c: Case) -> int:
    """Multiply-adds of a pass."""
    return c.n * math.prod(c.i) * math.prod(c.w_shape)
