"""What outlives the process: exported functions, and the persistent compilation cache."""

import functools
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxconv
from jaxconv import ffi

X, W = (4, 8, 6), (8, 4, 3)


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in (X, W))  # pyright: ignore[reportReturnType]


def loss(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sin(jaxconv.conv_transpose1d(x, w, stride=2, groups=2)).sum()


GRADIENTS = jax.value_and_grad(loss, (0, 1))
export = functools.partial(jax.export.export, disabled_checks=list(jaxconv.EXPORT_DISABLED_CHECKS))


@pytest.fixture
def wanted():
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, GRADIENTS(*map(jnp.asarray, arrays())))


def in_fresh_process(program: str, *arguments: Any) -> str:
    """What a program prints; it starts with the arrays x and w, and 8 CPU devices."""
    start = (
        "import os, sys; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'\n"
        "import numpy as np, jax, jax.export, jax.numpy as jnp, jaxconv\n"
        "from jax.sharding import *\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "rng = np.random.default_rng(0)\n"
        f"x, w = (rng.standard_normal(s).astype(np.float32) for s in {(X, W)})\n"
    )
    command = [sys.executable, "-c", start + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def reloaded(exported: Any, tmp_path: pathlib.Path, program: str) -> list[np.ndarray]:
    """The results, of which a program makes a list `out`, of an exported function `f` in a fresh
    process."""
    file, results = tmp_path / "exported", tmp_path / "results.npz"
    file.write_bytes(exported.serialize(vjp_order=1))
    load = "f = jax.export.deserialize(open(sys.argv[1], 'rb').read())\n"
    in_fresh_process(load + program + "\nnp.savez(sys.argv[2], *out)", file, results)
    with np.load(results) as found:
        return list(found.values())


def assert_same(got: list[np.ndarray], wanted: Any) -> None:
    for a, b in zip(got, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_reloaded_in_a_fresh_process(tmp_path, wanted):
    exported = export(jax.jit(GRADIENTS), platforms=["cpu"])(*arrays())
    assert_same(reloaded(exported, tmp_path, "out = jax.tree.leaves(f.call(x, w))"), wanted)


def test_differentiated_after_reloading(tmp_path, wanted):
    exported = export(jax.jit(loss), platforms=["cpu"])(*arrays())
    program = "out = jax.tree.leaves(jax.value_and_grad(f.call, (0, 1))(x, w))"
    assert_same(reloaded(exported, tmp_path, program), wanted)


def test_symbolic_batch(tmp_path, wanted):
    (n,) = jax.export.symbolic_shape("n")
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, *X[1:]), W))
    exported = export(jax.jit(GRADIENTS), platforms=["cpu"])(x, w)
    program = "f.call(x[:3], w); out = jax.tree.leaves(f.call(x, w))"
    assert_same(reloaded(exported, tmp_path, program), wanted)


def test_one_export_for_both_platforms(tmp_path, wanted, cuda_missing):
    exported = export(jax.jit(GRADIENTS), platforms=["cpu", "cuda"])(*arrays())
    assert exported.platforms == ("cpu", "cuda")
    assert_same(reloaded(exported, tmp_path, "out = jax.tree.leaves(f.call(x, w))"), wanted)
    if "cuda" not in ffi.built_platforms():
        cuda_missing("jaxconv was built without its CUDA kernels")
    # Each platform's own kernels, and nothing else.
    text = exported.mlir_module()
    assert text.count("@jaxconv_weight_grad") == 2
    assert "stablehlo.convolution" not in text
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        cuda_missing("no CUDA device")
    found = jax.export.deserialize(exported.serialize(vjp_order=1))
    on_device = [jax.device_put(a, device) for a in arrays()]
    for a, b in zip(jax.tree.leaves(found.call(*on_device)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)  # TF32


def shard_mapped(mesh: Any) -> Callable[..., jax.Array]:
    return jax.shard_map(
        lambda x, w: jax.lax.psum(loss(x, w), "b"), mesh=mesh, in_specs=(P("b"), P()), out_specs=P()
    )


@pytest.mark.parametrize("mode", ["explicit", "shard_map"])
def test_many_devices(tmp_path, wanted, mode):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    devices = jax.devices("cpu")[:4]
    mesh = jax.make_mesh((4,), ("b",), axis_types=(kind,), devices=devices)
    function = jax.jit(loss if mode == "explicit" else shard_mapped(mesh))
    x, w = (
        jax.device_put(a, NamedSharding(mesh, p))
        for a, p in zip(arrays(), (P("b"), P()), strict=True)
    )
    exported = export(function, platforms=["cpu"])(x, w)
    assert exported.nr_devices == 4
    program = (
        "m = jax.make_mesh((4,), ('b',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])\n"
        "x = jax.device_put(x, NamedSharding(m, PartitionSpec('b')))\n"
        "w = jax.device_put(w, NamedSharding(m, PartitionSpec()))\n"
        "out = [jax.jit(f.call)(x, w)]"
    )
    assert_same(reloaded(exported, tmp_path, program), wanted[0])


def test_ahead_of_time(wanted):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (X, W))
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(GRADIENTS).lower(x, w).compile()
        assert_same(jax.tree.leaves(compiled(*map(jnp.asarray, arrays()))), wanted)


CACHED = """
jax.config.update('jax_compilation_cache_dir', sys.argv[1])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
jax.config.update('jax_remove_custom_partitioning_ptr_from_cache_key', True)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
mode, padding = sys.argv[2], eval(sys.argv[3])
def f(x, w):
    return jax.grad(lambda w: jnp.sin(
        jaxconv.conv_transpose1d(x, w, stride=2, padding=padding, groups=2)).sum())(w)
if mode != 'one':
    kind = AxisType.Explicit if mode == 'explicit' else AxisType.Auto
    mesh = jax.make_mesh((4,), ('b',), axis_types=(kind,), devices=jax.devices()[:4])
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec('b')))
    w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
if mode == 'shard_map':
    f = jax.shard_map(f, mesh=mesh, in_specs=(PartitionSpec('b'), PartitionSpec()),
                      out_specs=PartitionSpec())
lowered = jax.jit(f).lower(x, w)
del events[:]
compiled = lowered.compile()
hits = events.count('/jax/compilation_cache/cache_hits')
print(hits, float(np.abs(np.asarray(compiled(x, w))).sum()))
"""


@pytest.mark.parametrize("mode", ["one", "shard_map", "explicit", "auto"])
def test_persistent_cache_hits(tmp_path, mode):
    def run(padding: str) -> tuple[int, float]:
        hits, value = in_fresh_process(CACHED, tmp_path, mode, padding).split()
        return int(hits), float(value)

    first = run("[(1, 1)]")
    assert first[0] == 0
    assert run("[(1, 1)]") == (1, first[1])
    if mode == "auto":
        # The same shapes, and another problem.
        other = run("[(0, 2)]")
        assert other[0] == 0
        assert other[1] != first[1]
