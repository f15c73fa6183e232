"""Upsamples one volume that is divided over several devices, and trains the layer that does it.

    python examples/big_volume.py                 # four CPU devices, 64 voxels a side
    python examples/big_volume.py --size 1024     # on GPUs: 1024 x 1024 x 1024 voxels

The layer is the last upsampling of a U-Net, kernel 3 and stride 2. Each device holds a slab of the
input along the first axis, and gets from its neighbour the one plane that its outputs need beside
its own (`jaxconv.spatial`); no device ever holds the whole of anything but the weights. Input and
target are formulas of the position, so that every number of devices computes with the same volume,
and what a step gives on one device is what it gives on many.

The script prints how long the forward and a training step take, the loss of some steps, and, where
`--check` says so or the volume is small, how far all this is from the same on one device.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__" and "XLA_FLAGS" not in os.environ:
    # On a machine without GPUs the CPU plays four devices.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxconv

C_IN, C_OUT, KERNEL = 16, 4, 3
LAYER: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": 1}
SLABS = P(None, None, "slab")
RATE, STEPS = 0.5, 5

Params = tuple[jax.Array, jax.Array]  # weight, bias


class Functions(NamedTuple):
    """What runs on the devices of a mesh, over slabs of the volume."""

    volume: Callable[[], jax.Array]
    """Makes the input."""
    forward: Callable[[Params, jax.Array], jax.Array]
    step: Callable[[Params, jax.Array], tuple[Params, jax.Array, jax.Array]]
    """A step of gradient descent: new parameters, the loss, and the norm of the input's gradient,
    which is what layers before this one would be trained with."""


def field(channels: int, shape: Sequence[int], first: jax.Array | int) -> jax.Array:
    """Waves over planes `first` ... of a volume, (1, channels, *shape), not the same in any two
    channels."""
    channel, z, y, x = (
        lax.broadcasted_iota(jnp.float32, (1, channels, *shape), axis) for axis in range(1, 5)
    )
    z = z + jnp.asarray(first, jnp.float32)
    return jnp.sin((0.3 + 0.05 * channel) * z + 0.21 * y - 0.13 * x + channel)


def functions(mesh: Mesh, size: int, depth: int | None = None) -> Functions:
    """For a volume of `size` output voxels along each axis, or `depth` along the first, which the
    mesh's devices divide."""
    depth = size if depth is None else depth
    planes = depth // 2 // mesh.size

    def volume() -> jax.Array:
        return field(C_IN, (planes, size // 2, size // 2), lax.axis_index("slab") * planes)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        return jaxconv.spatial.conv_transpose3d(x, *params, **LAYER, axis_name="slab")

    def loss(params: Params, x: jax.Array) -> jax.Array:
        y = forward(params, x)
        target = field(C_OUT, y.shape[2:], lax.axis_index("slab") * y.shape[2])
        return lax.psum(((y - target) ** 2).sum(), "slab") / float(C_OUT * depth * size**2)

    def step(params: Params, x: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
        # The parameters are the same on all devices, so their gradients come summed over them.
        value, (gradients, dx) = jax.value_and_grad(loss, (0, 1))(params, x)
        norm = lax.psum((dx * dx).sum(), "slab") ** 0.5
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), value, norm

    divided = functools.partial(jax.shard_map, mesh=mesh)
    return Functions(
        jax.jit(divided(volume, in_specs=(), out_specs=SLABS)),
        jax.jit(divided(forward, in_specs=(P(), SLABS), out_specs=SLABS)),
        jax.jit(divided(step, in_specs=(P(), SLABS), out_specs=P())),
    )


def init_params(mesh: Mesh) -> Params:
    rng = np.random.default_rng(0)
    taps = KERNEL**3 / 8  # that reach an output voxel on average
    weight = rng.standard_normal((C_IN, C_OUT, *(KERNEL,) * 3)) / (C_IN * taps) ** 0.5
    params = weight.astype(np.float32), np.zeros(C_OUT, np.float32)
    return jax.device_put(params, NamedSharding(mesh, P()))


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The least of some times that a function takes, after one call that compiles it."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def run(devices: list[Any], size: int) -> dict[str, np.ndarray]:
    """Prints times; returns the losses and the norms of some steps, the weight after them, and one
    output voxel in each 8 x 8 x 8 of the first forward."""
    mesh = Mesh(np.array(devices), ("slab",))
    f, params = functions(mesh, size), init_params(mesh)
    x = f.volume()
    gigabytes = 4 * (C_IN * (size / 2) ** 3 + C_OUT * size**3) / 1e9 / len(devices)
    forward = seconds(lambda: f.forward(params, x))
    sample = np.asarray(jax.jit(lambda p, x: f.forward(p, x)[..., ::8, ::8, ::8])(params, x))
    step = seconds(lambda: f.step(params, x))
    losses, norms = [], []
    for _ in range(STEPS):
        params, loss, norm = f.step(params, x)
        losses.append(float(loss))
        norms.append(float(norm))
    print(
        f"{len(devices)} x {devices[0].device_kind}, {gigabytes:.2f} GB of input and output each: "
        f"forward {1e3 * forward:.1f} ms, training step {1e3 * step:.1f} ms, losses "
        + " ".join(f"{loss:.5f}" for loss in losses)
    )
    return {
        "losses": np.array(losses),
        "gradient norms": np.array(norms),
        "weight": np.asarray(params[0]),
        "output": sample,
    }


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest differences of what `run` gives, relative to the largest values."""
    return {name: float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in b}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="output voxels along each axis")
    parser.add_argument("--check", action="store_true", help="compare with one device")
    arguments = parser.parse_args()
    devices = jax.devices()
    if arguments.size % (2 * len(devices)) != 0:
        raise SystemExit(f"--size must be a multiple of {2 * len(devices)}, for equal slabs")
    many = run(devices, arguments.size)
    if arguments.check or arguments.size <= 128:
        errors = difference(many, run(devices[:1], arguments.size))
        said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"Apart by at most, relative to the largest: {said}.")
        # A GPU multiplies float32 with TF32's 11 bits by default, the same way in both; what
        # differs is the order of sums.
        if not max(errors.values()) < 1e-4:
            raise SystemExit("The divided volume gives another result than the whole.")


if __name__ == "__main__":
    main()
