"""The layers that jaxconv and its peers are measured on, and what each must cost at the least.

Nothing here knows a framework, so tests use the same list. The letters are those of the project: n
batch, ci and co channels, g groups, i input sizes, o output sizes, and on each spatial axis k
kernel size, s stride, p padding, op output padding, d dilation.

Sets: "seed" is the five layers that jaxconv was begun for, "kb" the other transposed convolutions
of KernelBench level 1 (kb57 is its problem 57), "net" layers of well-known networks, and "cpu"
layers of a size that a CPU runs in milliseconds: some of the above, shrunk, and others.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Sizes = tuple[int, ...]
Role = Literal["x", "w", "y"]
Pass = Literal["forward", "input_grad", "weight_grad", "step"]

# What each pass computes from the other arrays; a step is a forward and both gradients.
RESULTS: dict[Pass, tuple[Role, ...]] = {
    "forward": ("y",),
    "input_grad": ("x",),
    "weight_grad": ("w",),
    "step": ("y", "x", "w"),
}
SETS = ("seed", "kb", "net", "cpu")


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """One transposed convolution: x (n, ci, *i), w (ci, co // g, *k), y (n, co, *o)."""

    name: str
    set: str
    n: int
    ci: int
    co: int
    g: int
    i: Sizes
    k: Sizes
    s: Sizes
    p: Sizes
    op: Sizes
    d: Sizes

    @property
    def rank(self) -> int:
        return len(self.i)

    @property
    def o(self) -> Sizes:
        return tuple(
            (i - 1) * s - 2 * p + d * (k - 1) + op + 1
            for i, k, s, p, op, d in zip(
                self.i, self.k, self.s, self.p, self.op, self.d, strict=True
            )
        )

    def shape(self, role: Role, channels_last: bool = False) -> Sizes:
        """The shape of x, w or y; that of w is the same in both layouts."""
        if role == "w":
            return (self.ci, self.co // self.g, *self.k)
        channels, sizes = (self.ci, self.i) if role == "x" else (self.co, self.o)
        return (self.n, *sizes, channels) if channels_last else (self.n, channels, *sizes)

    def arguments(self) -> dict[str, Any]:
        """What jaxconv.conv_transpose1d, 2d and 3d take besides x and weight."""
        return {
            "stride": self.s,
            "padding": self.p,
            "output_padding": self.op,
            "groups": self.g,
            "dilation": self.d,
        }

    def spec_arguments(self) -> dict[str, Any]:
        """The fields of jaxconv.spec.ConvSpec that the workload decides."""
        return {
            "in_size": self.i,
            "out_size": self.o,
            "kernel_size": self.k,
            "stride": self.s,
            "padding": self.p,
            "dilation": self.d,
            "groups": self.g,
            "stack": 0,
        }

    def terms(self, result: Role) -> int:
        """The most products that are summed in one element of y, x (gradient) or w (gradient)."""
        if result == "w":
            return self.n * math.prod(self.i)
        if result == "x":
            return self.co // self.g * math.prod(self.k)
        # Taps whose t * d agree modulo s meet in one output, and lie s // gcd(s, d) apart.
        taps = (
            math.ceil(k * math.gcd(s, d) / s)
            for k, s, d in zip(self.k, self.s, self.d, strict=True)
        )
        return self.ci // self.g * math.prod(taps)

    def flop(self, pass_: Pass = "forward") -> int:
        """Useful operations: no inserted zeros, but those that padding then cuts off."""
        one = 2 * self.n * self.ci * (self.co // self.g) * math.prod(self.k) * math.prod(self.i)
        return one * len(RESULTS[pass_])

    def least_bytes(self, itemsize: int, pass_: Pass = "forward") -> int:
        """Each operand read once, each result written once.

        A step reads y's cotangent only once y is complete. So x and w are read twice, in the
        forward and in the gradients, which may share what they read.
        """
        x, w, y = (math.prod(self.shape(role)) for role in ("x", "w", "y"))
        elements = 3 * x + 3 * w + 2 * y if pass_ == "step" else x + w + y
        return elements * itemsize


def _layer(
    set_: str,
    name: str,
    n: int,
    ci: int,
    co: int,
    g: int,
    i: Sizes,
    k: int | Sizes,
    s: int | Sizes = 1,
    p: int | Sizes = 0,
    op: int | Sizes = 0,
    d: int | Sizes = 1,
) -> Workload:
    k, s, p, op, d = ((v,) * len(i) if isinstance(v, int) else v for v in (k, s, p, op, d))
    return Workload(name, set_, n, ci, co, g, i, k, s, p, op, d)


_GPU = (
    _layer("seed", "s0_kb72", 8, 32, 32, 4, (12, 24, 48), (3, 5, 7), 2, (1, 2, 3), 1),
    _layer("seed", "s1_kb73", 4, 32, 32, 4, (32, 64, 128), 3, 2, 1),
    _layer("seed", "s2_kb68", 16, 32, 64, 1, (64, 64, 64), (3, 5, 5)),
    _layer("seed", "s3_kb58", 16, 32, 16, 1, (16, 32, 64), (3, 5, 7)),
    _layer("seed", "s4_kb71", 8, 32, 32, 1, (512, 1024), 3),
    _layer("kb", "kb57", 8, 64, 64, 1, (1024, 1024), 3),
    _layer("kb", "kb61", 8, 48, 48, 1, (64, 64, 64), 3),
    _layer("kb", "kb64", 64, 128, 128, 1, (65536,), 3),
    _layer("kb", "kb65", 8, 64, 64, 1, (512, 512), (3, 7)),
    _layer("kb", "kb69", 64, 64, 128, 1, (128, 256), (3, 5)),
    _layer("kb", "kb70", 8, 48, 24, 1, (96, 96, 96), 3),
    _layer("kb", "kb74", 32, 32, 64, 1, (131072,), 5, 1, 0, 0, 3),
    _layer("kb", "kb75", 16, 32, 64, 4, (128, 256), (3, 5), (2, 3), (1, 2), 0, (2, 1)),
    _layer("kb", "kb77", 16, 32, 64, 1, (16, 32, 32), 3, 2, 1, 0, 2),
    _layer("kb", "kb78", 8, 32, 32, 1, (512, 1024), (3, 7), 1, (1, 3)),
    _layer("kb", "kb79", 16, 32, 64, 1, (131072,), 3, 2, 1, 0, 2),
    _layer("kb", "kb81", 16, 32, 64, 1, (64, 128), 3, 5, 1, 0, 2),
    _layer("net", "nnunet_64_32", 2, 64, 32, 1, (64, 64, 64), 2, 2),
    _layer("net", "nnunet_128_64", 2, 128, 64, 1, (32, 32, 32), 2, 2),
    _layer("net", "nnunet_320_256", 2, 320, 256, 1, (8, 8, 8), 2, 2),
    _layer("net", "gan3d_512_256", 32, 512, 256, 1, (4, 4, 4), 4, 2, 1),
    _layer("net", "gan3d_128_64", 32, 128, 64, 1, (16, 16, 16), 4, 2, 1),
    _layer("net", "gan3d_64_1", 32, 64, 1, 1, (32, 32, 32), 4, 2, 1),
    _layer("net", "dcgan_512_256", 128, 512, 256, 1, (8, 8), 4, 2, 1),
    _layer("net", "dcgan_128_64", 128, 128, 64, 1, (32, 32), 4, 2, 1),
    _layer("net", "compressai_192", 8, 192, 192, 1, (64, 96), 5, 2, 2, 1),
    _layer("net", "hifigan_512_256", 16, 512, 256, 1, (256,), 16, 8, 4),
    _layer("net", "hifigan_64_32", 16, 64, 32, 1, (16384,), 4, 2, 1),
    _layer("net", "depthwise3d", 4, 64, 64, 64, (48, 48, 48), 4, 2, 1),
    _layer("net", "depthwise2d", 8, 128, 128, 128, (128, 128), 4, 2, 1),
    _layer("net", "unet3d_g8_k3s2", 4, 64, 64, 8, (32, 32, 32), 3, 2, 1, 1),
    # The layer of https://github.com/jax-ml/jax/issues/31662.
    _layer("net", "jax31662", 1, 64, 1, 1, (64, 64, 32), 3, 2, 1, 1),
    _layer("net", "oobleck_512_256", 1, 512, 256, 1, (12920,), 8, 4, 2),
    # The layer of https://github.com/pytorch/pytorch/issues/47341.
    _layer("net", "pytorch47341", 16, 512, 512, 512, (32,), 6, 3, 2, 1),
)


def _shrunk(name: str, n: int, i: Sizes | None = None) -> Workload:
    """A layer of the list above with a smaller batch and, where given, smaller sizes."""
    (full,) = (w for w in _GPU if w.name == name)
    return dataclasses.replace(full, name=f"cpu_{name}", set="cpu", n=n, i=i or full.i)


_CPU = (
    _shrunk("s0_kb72", 2),
    _shrunk("s1_kb73", 1, (16, 32, 64)),
    _shrunk("s2_kb68", 1, (16, 24, 24)),
    _shrunk("s3_kb58", 1),
    _shrunk("s4_kb71", 1, (256, 512)),
    _shrunk("nnunet_64_32", 1, (32, 32, 32)),
    _shrunk("gan3d_128_64", 2),
    _shrunk("depthwise3d", 1, (24, 24, 24)),
    _shrunk("hifigan_64_32", 2),
    _layer("cpu", "cpu_monai_64_16", 1, 64, 16, 1, (16, 16, 16), 3, 2, 1, 1),
    _layer("cpu", "cpu_mednext_64", 1, 64, 64, 64, (16, 16, 16), 3, 2, 1),
    _layer("cpu", "cpu_grouped_32_32", 2, 32, 32, 4, (16, 16, 16), 3, 2, 1),
    _layer("cpu", "cpu_jax31662", 1, 64, 1, 1, (64, 64, 32), 3, 2, 1, 1),
    _layer("cpu", "cpu_dilated_32_32", 2, 32, 32, 1, (16, 16, 16), 3, 2, 2, 0, 2),
    _layer("cpu", "cpu_dcgan_128_64", 16, 128, 64, 1, (32, 32), 4, 2, 1),
    _layer("cpu", "cpu_hifigan_512_256", 1, 512, 256, 1, (64,), 16, 8, 4),
    _layer("cpu", "cpu_mimi_512", 1, 512, 512, 512, (250,), 4, 2),
    _layer("cpu", "cpu_k32s16_64_64", 1, 64, 64, 1, (8, 8), 32, 16),
)

WORKLOADS: tuple[Workload, ...] = _GPU + _CPU


def select(patterns: Iterable[str], among: Sequence[Workload] = WORKLOADS) -> list[Workload]:
    """The workloads that any of the patterns names: a set, a name, or a glob of names."""
    chosen: set[str] = set()
    for pattern in patterns:
        found = [w.name for w in among if w.set == pattern or fnmatch.fnmatch(w.name, pattern)]
        if not found:
            raise ValueError(f"no workload or set is called {pattern!r}; sets: {SETS}")
        chosen.update(found)
    return [w for w in among if w.name in chosen]
