"""Runs every CUDA kernel on small problems, for compute-sanitizer to watch; see .ci/gpu.

    compute-sanitizer --tool memcheck python tests/every_kernel.py

Each buffer is an allocation of its own here, so that a step beyond one is seen.
"""

import os

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"

import sys

import jax
import jax.numpy as jnp
import numpy as np

import cases
from cases import CASES, DTYPES
from jaxconv import ffi, primitive
from jaxconv.spec import Role
from workloads import WORKLOADS

ROLES: tuple[Role, ...] = ("y", "x", "w")


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    ran: set[tuple[str, Role]] = set()
    for number, c in enumerate([*CASES, *map(cases.shrunk, WORKLOADS)]):
        last = number % 2 == 1  # both layouts and all dtypes in turn: each is a pass over memory
        for dtype in DTYPES if number % 4 == 0 else ("float32", "bfloat16"):
            # NumPy prepares the arrays: XLA then runs nothing but the kernels.
            x, w, y, _ = (a.astype(jnp.dtype(dtype)) for a in c.arrays())
            if last:
                x, y = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, y))
            arrays = {"x": jnp.asarray(x), "w": jnp.asarray(w), "y": jnp.asarray(y)}
            for result in ROLES:
                a, b = (arrays[role] for role in primitive.OPERANDS[result])
                spec = c.spec(channels_last=last)
                rows = ffi.verdicts(
                    "cuda", result, out=arrays[result], bias=False, spec=spec, **arrays
                )
                for name in [name for name, refusal, _, _ in rows if not refusal]:
                    # The sanitizers are slow: problems of a few tiles each, less for "direct",
                    # which has no tiles.
                    if cases.work(c) > (1e5 if name == "direct" else 2e7):
                        continue
                    forced = spec.replace(implementation=name)
                    operation = primitive._PRIMITIVES[result]
                    jax.block_until_ready(operation.bind(a, b, spec=forced))
                    ran.add((name, result))
    print(f"{len(ran)} kernels ran: {', '.join(sorted(f'{name} {role}' for name, role in ran))}")
    missing = {(name, role) for role in ROLES for name in ffi.kernel_names("cuda", role)} - ran
    if missing:
        sys.exit(f"no small problem enters {sorted(missing)}")


if __name__ == "__main__":
    main()
