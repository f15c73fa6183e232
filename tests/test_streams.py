"""Many threads at once, and layers in one CUDA graph."""

import concurrent.futures
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import cases
import jaxconv

THREADS, CALLS = 8, 1000


def test_threads_do_not_disturb_each_other(platform):
    """Each thread calls a problem of its own, and some that others call, over and over."""
    problems = [
        cases.case("", 1 + t % 3, 8, 8, 1 + t % 2, (5 + t, 6), 3, 2, 1, 1) for t in range(THREADS)
    ]

    @jax.jit
    def shared(x, w):
        return jnp.sin(jaxconv.conv_transpose2d(x, w, stride=2, padding=1))

    def work(t: int) -> None:
        c = problems[t]
        x, w, y, _ = (jnp.asarray(a, jnp.float32) for a in c.arrays(seed=t))
        forward = jax.jit(lambda x, w: jaxconv.conv_transpose2d(x, w, **c.arguments()))
        gradients = jax.jit(lambda x, w, y: jax.vjp(forward, x, w)[1](y))
        sx, sw = jnp.ones((2, 4, 6, 6), jnp.float32) * t, jnp.ones((4, 4, 3, 3), jnp.float32)
        wanted = jax.tree.map(np.asarray, (forward(x, w), gradients(x, w, y), shared(sx, sw)))
        # TF32 at most: it is this thread's problem at all.
        exact = c.definition().y(*c.arrays(seed=t)[:2])
        assert np.abs(wanted[0] - exact).max() < 0.1
        for _ in range(CALLS // 20):
            # Several in flight, so that threads' work is interleaved on the device.
            several = [(forward(x, w), gradients(x, w, y), shared(sx, sw)) for _ in range(20)]
            for got in several:
                jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, got), wanted)

    def with_device(t: int) -> None:
        with jax.default_device(jax.devices(platform)[0]):  # each thread has its own
            work(t)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(with_device, range(THREADS)))


CAPTURED = """
import jax, jax.numpy as jnp, jaxconv
x = jax.random.normal(jax.random.key(0), (2, 8, 16, 16))
w = jax.random.normal(jax.random.key(1), (8, 8, 3, 3)) / 10
def layers(x, w):
    for _ in range(6):
        x = jnp.tanh(jaxconv.conv_transpose2d(x, w, padding=1))
    return x
def loop(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, x: layers(x, w), x)
gradients = jax.jit(jax.grad(lambda x, w: layers(x, w).sum(), (0, 1)))
loop = jax.jit(loop)
first = jax.tree.leaves((loop(x, w), gradients(x, w)))
for _ in range(3):
    for a, b in zip(jax.tree.leaves((loop(x, w), gradients(x, w))), first):
        assert (a == b).all()
"""


def test_layers_are_captured_in_a_cuda_graph(tmp_path, cuda_missing):
    """XLA's dump says which of its steps are in a command buffer, which it launches as a graph."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        cuda_missing("no CUDA device")
    flags = f"--xla_dump_to={tmp_path} --xla_gpu_graph_min_graph_size=1"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Six layers and, in the second function, as many input and weight gradients.
    for function, operations in (("loop", 6), ("lambda", 18)):
        (dump,) = tmp_path.glob(f"*jit_*{function}*thunk_sequence_after_thunk_passes.txt")
        lines = dump.read_text().splitlines()
        # Steps in a command buffer are printed below it, farther in.
        captured, margin = 0, None
        for line in lines:
            indent = len(line) - len(line.lstrip())
            if margin is not None and indent <= margin:
                margin = None
            if "kCommandBuffer" in line:
                margin = indent
            elif "kCustomCall" in line:
                assert margin is not None, dump.read_text()
                captured += 1
        assert captured >= operations, dump.read_text()
