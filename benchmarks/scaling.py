"""How training steps and a divided volume scale with the number of GPUs.

    python benchmarks/scaling.py --devices 1,2,4 --json FILE     # needs the extra "examples"

- batch: a training step with the batch sharded under automatic sharding, of the segmentation
  network of examples/segment_brain.py on random volumes of the brain's size, and of the layer
  s1_kb73 with both gradients. Every device has as much of a batch as one device alone.
- volume: forward and training step of examples/big_volume.py. Of a volume of --size voxels along
  each axis the most devices have all, and fewer of them as many planes each (so one device has what
  it can hold). One of --shared-size is divided by any number of devices, and compared with that of
  one device.
- links: how fast an all-reduce and a collective permute are.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxconv
import workloads

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))

import big_volume
import segment_brain

BRAIN = (200, 236, 192)
ROUNDS, SAMPLE_S = 5, 0.2


def seconds(function: Callable[[], Any]) -> float:
    """The median over rounds of what one call takes. A GPU's calls are enqueued back to back; CPU
    devices that share a pool of threads could each wait for another's part of a later call."""
    in_turn = jax.default_backend() == "cpu"
    jax.block_until_ready(function())
    start = time.perf_counter()
    jax.block_until_ready(function())
    calls = max(2, round(SAMPLE_S / (time.perf_counter() - start)))
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = function()
            if in_turn:
                jax.block_until_ready(out)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def batch_mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), ("b",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def random_shards(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal values, the first axis divided over the mesh."""
    make = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype),
        out_shardings=NamedSharding(mesh, P("b")),
    )
    return make()


def segmentation_step(devices: int, per_device: int = 1) -> float:
    mesh = batch_mesh(devices)
    n = devices * per_device
    optimizer = optax.adam(1e-3, b2=0.99)
    step = segment_brain.make_step(optimizer, jaxconv.conv_transpose3d)
    params = jax.device_put(segment_brain.init_params(0), NamedSharding(mesh, P()))
    state = jax.device_put(optimizer.init(params), NamedSharding(mesh, P()))
    image = random_shards(mesh, (n, 1, *BRAIN))
    truth = random_shards(mesh, (n, *BRAIN))
    batch = segment_brain.Batch(image, (truth > 0.5).astype(jnp.int32), truth > -10)

    def run() -> jax.Array:
        nonlocal params, state
        params, state, loss = step(params, state, batch)
        return loss

    return seconds(run)


def layer_step(devices: int) -> float:
    """Forward, both gradients and the weights' update of s1_kb73."""
    (layer,) = workloads.select(["s1_kb73"])
    mesh = batch_mesh(devices)
    x = random_shards(mesh, (layer.n * devices, layer.ci, *layer.i))
    rng = np.random.default_rng(0)
    w = rng.standard_normal((layer.ci, layer.co // layer.g, *layer.k)).astype(np.float32) / 10
    w, b = jax.device_put((w, np.zeros(layer.co, np.float32)), NamedSharding(mesh, P()))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, b, x):
        def loss(w, b, x):
            y = jaxconv.conv_transpose3d(x, w, b, layer.s, layer.p, layer.op, layer.g, layer.d)
            return (y * y).mean()

        dw, db, dx = jax.grad(loss, (0, 1, 2))(w, b, x)
        return w - 1e-3 * dw, b - 1e-3 * db, dx

    def run() -> jax.Array:
        nonlocal w, b
        w, b, dx = step(w, b, x)
        return dx

    return seconds(run)


def volume(devices: int, size: int, depth: int) -> dict[str, float]:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("slab",))
    f, params = big_volume.functions(mesh, size, depth), big_volume.init_params(mesh)
    x = f.volume()
    return {
        "forward_s": seconds(lambda: f.forward(params, x)),
        "step_s": seconds(lambda: f.step(params, x)),
    }


def links(devices: int) -> dict[str, float]:
    """Seconds of an all-reduce of few and of many bytes, and bytes a second of both collectives:
    those that each device sends, 2 (p - 1) / p of an array in an all-reduce of p devices."""
    mesh = batch_mesh(devices)

    def collective(function: Callable[..., Any], elements: int) -> float:
        x = random_shards(mesh, (devices, elements))
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
        jitted = jax.jit(mapped)
        return seconds(lambda: jitted(x))

    def summed(x: jax.Array) -> jax.Array:
        return lax.pcast(lax.psum(x, "b"), "b", to="varying")

    def shifted(x: jax.Array) -> jax.Array:
        return lax.ppermute(x, "b", [(r, r + 1) for r in range(devices - 1)])

    large = 2**28
    return {
        "all_reduce_4kB_s": collective(summed, 2**10),
        "all_reduce_1GB_Bps": 4 * large * 2 * (devices - 1) / devices / collective(summed, large),
        "permute_4kB_s": collective(shifted, 2**10),
        "permute_1GB_Bps": 4 * large / collective(shifted, large),
    }


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", default="1,2,4", help="how many, each measured")
    parser.add_argument("--size", type=int, default=1024, help="output voxels along each axis")
    parser.add_argument("--shared-size", type=int, default=768, help="the same, for any number")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--commit", default=None, help="of what runs, where there is no git")
    arguments = parser.parse_args()
    counts = [int(n) for n in arguments.devices.split(",")]
    device = jax.devices()[0]
    results: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxconv": jaxconv.__version__,
        "commit": arguments.commit or commit(),
        "platform_version": getattr(device.client, "platform_version", "").split("\n")[0],
        "segmentation_step": {},
        "s1_kb73_step": {},
        "volume": {},
        "shared_volume": {},
        "shared_volume_error": {},
        "links": {},
        "size": arguments.size,
        "shared_size": arguments.shared_size,
    }

    def note(what: str, devices: int, value: Any) -> None:
        results[what][str(devices)] = value
        print(f"{what} on {devices}: {value}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    for n in counts:
        note("s1_kb73_step", n, layer_step(n))
    for n in counts:
        note("segmentation_step", n, segmentation_step(n))
    for n in counts:
        depth = arguments.size * n // max(counts)
        note("volume", n, volume(n, arguments.size, depth))
    for n in counts:
        note("shared_volume", n, volume(n, arguments.shared_size, arguments.shared_size))
    several = [n for n in counts if n > 1]
    one = big_volume.run(jax.devices()[:1], arguments.shared_size) if several else {}
    for n in several:
        many = big_volume.run(jax.devices()[:n], arguments.shared_size)
        note("shared_volume_error", n, big_volume.difference(many, one))
    for n in several:
        note("links", n, links(n))

    first = str(counts[0])
    for what in ("s1_kb73_step", "segmentation_step"):
        for n in counts[1:]:
            gain = n / counts[0] * results[what][first] / results[what][str(n)]
            print(f"{what}: {n} devices do {gain:.2f} times the work of {first} in a second")
    for key in ("forward_s", "step_s"):
        for n in counts[1:]:
            times, shared = results["volume"], results["shared_volume"]
            efficiency = times[first][key] / times[str(n)][key]
            divided = shared[first][key] * counts[0] / (n * shared[str(n)][key])
            print(
                f"volume {key}: {n} devices at {100 * efficiency:.1f} % efficiency with as much "
                f"each, {100 * divided:.1f} % with a share"
            )


if __name__ == "__main__":
    main()
