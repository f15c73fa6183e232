"""Runs every CUDA kernel on small problems, for compute-sanitizer to watch; see .ci/gpu.

    compute-sanitizer --tool memcheck python tests/every_kernel.py
    ... tests/every_kernel.py --share 0/4 >log.0  # a quarter of the problems
    python tests/every_kernel.py --ran log.*    # did the shares together enter all kernels?

Each buffer is an allocation of its own here, so that a step beyond one is seen.
"""

import os

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"

import argparse
import fileinput
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


def run(share: int, shares: int, only: list[str]) -> set[tuple[str, str]]:
    """Runs every `shares`-th problem from `share` on; returns the kernels that ran."""
    jax.config.update("jax_enable_x64", True)
    ran: set[tuple[str, str]] = set()
    problems = list(enumerate([*CASES, *map(cases.shrunk, WORKLOADS)]))
    for number, c in problems[share::shares]:
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
                    if only and name not in only:
                        continue
                    # The sanitizers are slow: problems of a few tiles each, less for "direct",
                    # which has no tiles.
                    if cases.work(c) > (1e5 if name == "direct" else 2e7):
                        continue
                    forced = spec.replace(implementation=name)
                    operation = primitive._PRIMITIVES[result]
                    jax.block_until_ready(operation.bind(a, b, spec=forced))
                    ran.add((name, result))
    return ran


def check(ran: set[tuple[str, str]], only: list[str]) -> None:
    wanted = {(name, role) for role in ROLES for name in ffi.kernel_names("cuda", role)}
    if missing := {w for w in wanted if not only or w[0] in only} - ran:
        sys.exit(f"no small problem enters {sorted(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", default="0/1", help="I/N: the I-th of N shares of the problems")
    parser.add_argument(
        "--only", action="append", default=[], help="a kernel, of several; default: all"
    )
    parser.add_argument("--ran", nargs="+", help="what shares printed: checks, and runs nothing")
    options = parser.parse_args()
    if options.ran:
        with fileinput.input(options.ran) as lines:
            words = [line.split() for line in lines]
        check({(w[1], w[2]) for w in words if w[:1] == ["ran:"]}, options.only)
        return
    share, shares = map(int, options.share.split("/"))
    ran = run(share, shares, options.only)
    for name, result in sorted(ran):
        print("ran:", name, result)
    if shares == 1:
        check(ran, options.only)


if __name__ == "__main__":
    main()
