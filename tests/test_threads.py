"""The CPU kernels with different numbers of threads."""

import concurrent.futures
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxconv
from workloads import select

# Prints a digest of every result. Threads are those of the processors that the process may use.
PROGRAM = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import hashlib
import jax
import jax.numpy as jnp
import numpy as np
import cases
from jaxconv import ffi, primitive
from workloads import select
jax.config.update("jax_platforms", "cpu")
for workload in select(["cpu"]):
    case = cases.shrunk(workload)
    for last in (False, True):
        x, w, y, _ = (a.astype(np.float32) for a in case.arrays())
        if last:
            x, y = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, y))
        arrays = {"x": x, "w": w, "y": y}
        spec = case.spec(channels_last=last)
        for result, (a, b) in primitive.OPERANDS.items():
            rows = ffi.verdicts("cpu", result, out=arrays[result], bias=False, spec=spec, **arrays)
            for name in [name for name, refusal, _, _ in rows if not refusal and name != "direct"]:
                forced = spec.replace(implementation=name)
                out = primitive._PRIMITIVES[result].bind(
                    jnp.asarray(arrays[a]), jnp.asarray(arrays[b]), spec=forced
                )
                digest = hashlib.sha256(np.asarray(out).tobytes()).hexdigest()
                print(case.name, result, last, name, digest)
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two processors that the process can be bound to",
)
def test_same_bits_with_any_number_of_threads():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    printed = []
    for threads in (1, 2):
        command = [sys.executable, "-c", PROGRAM, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines())
    one, two = printed
    # At least one kernel for each workload, layout and operation.
    assert len(one) >= 6 * len(select(["cpu"]))
    assert one == two


def test_calls_at_the_same_time_have_memory_of_their_own():
    """Packed weights lie in memory that calls give back for others to take."""
    rng = np.random.default_rng(0)
    sizes = (64, 48, 96, 80, 32, 64, 112, 48)  # channels: some alike, most not
    cpu = jax.devices("cpu")[0]
    arrays = [
        tuple(
            jax.device_put(rng.standard_normal(shape, np.float32), cpu)
            for shape in ((1, c, 12, 12), (c, c, 3, 3))
        )
        for c in sizes
    ]
    with jax.default_device(cpu):
        layer = jax.jit(lambda x, w: jaxconv.conv_transpose2d(x, w, stride=2, implementation="cpu"))
        alone = [np.asarray(layer(x, w)) for x, w in arrays]

        def repeated(index: int) -> bool:
            with jax.default_device(cpu):
                x, w = arrays[index]
                wanted = jnp.asarray(alone[index])
                return all(bool((layer(x, w) == wanted).all()) for _ in range(20))

        with concurrent.futures.ThreadPoolExecutor(len(sizes)) as pool:
            assert all(pool.map(repeated, range(len(sizes))))
