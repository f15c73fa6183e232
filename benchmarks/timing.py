"""How long things take: operations, the machine's ceilings, and one call from Python.

Everything is timed by the wall clock over many calls between two synchronisations. On a GPU the
calls are enqueued back to back and each holds many operations in one executable (or, for torch, one
CUDA graph). They queue up behind work that takes longer than the host needs to enqueue them, and
whose time is subtracted: what counts is the device's time. On a CPU each call is waited for.
"""

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv import primitive
from jaxconv.spec import ConvSpec

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Runner:
    """`calls` operations that `enqueue` starts together and `wait` waits for."""

    enqueue: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int = 1
    hold: Callable[[], Any] | None = None
    """Enqueues a few milliseconds of the device's time in front of them."""

    def once(self) -> Any:
        out = self.enqueue()
        self.wait(out)
        return out


@dataclasses.dataclass
class Timing:
    """Seconds an operation took, one value a sample."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)


@dataclasses.dataclass(frozen=True)
class Timer:
    """`rounds` samples of at least `sample_s` seconds each, or fewer where `most_s` is used up."""

    rounds: int
    sample_s: float
    most_s: float
    wait_each: bool

    def _sample(self, runner: Runner, enqueues: int, held: float = 0) -> float:
        start = time.perf_counter()
        out = runner.hold() if runner.hold is not None else None
        for _ in range(enqueues):
            out = runner.enqueue()
            if self.wait_each:
                runner.wait(out)
        runner.wait(out)
        return (time.perf_counter() - start - held) / enqueues

    def _hold(self, runner: Runner) -> tuple[float, int]:
        """The seconds that the device is held, and how many enqueues fit into them."""
        if runner.hold is None:
            return 0, sys.maxsize
        held, host = [], []
        for _ in range(3):
            start = time.perf_counter()
            runner.wait(runner.hold())
            held.append(time.perf_counter() - start)
            out, start = runner.hold(), time.perf_counter()
            out = runner.enqueue()
            host.append(time.perf_counter() - start)
            runner.wait(out)
        return statistics.median(held), max(1, int(0.7 * min(held) / min(host)))

    def time(self, runners: Mapping[Key, Runner]) -> dict[Key, Timing]:
        """Times runners that have run once. Their samples are taken in turn, so that what else the
        machine does hits all alike."""
        hold = {key: self._hold(runner) for key, runner in runners.items()}
        first = {key: self._sample(runner, 1, hold[key][0]) for key, runner in runners.items()}
        enqueues = {
            key: min(max(1, math.ceil(self.sample_s / max(t, 1e-6))), hold[key][1])
            for key, t in first.items()
        }
        samples: dict[Key, list[float]] = {
            key: [t] if t >= self.most_s else [] for key, t in first.items()
        }
        used = dict(first)
        for _ in range(self.rounds):
            for key, runner in runners.items():
                if used[key] >= self.most_s:
                    continue
                start = time.perf_counter()
                if len(runners) > 1:
                    # OpenMP's threads of the one before spin for milliseconds, and caches hold its
                    # data. After the rest a kernel may wake threads on one core, for milliseconds.
                    time.sleep(0.02)
                    warm = time.perf_counter() + 2 * self.sample_s
                    while first[key] < 10 * self.sample_s:
                        runner.once()
                        if time.perf_counter() > warm:
                            break
                samples[key].append(self._sample(runner, enqueues[key], hold[key][0]))
                used[key] += time.perf_counter() - start
        return {
            key: Timing([t / runners[key].calls for t in values]) for key, values in samples.items()
        }


def timer(platform: str, rounds: int) -> Timer:
    if platform == "cuda":
        return Timer(rounds, sample_s=0.015, most_s=0.5, wait_each=False)
    return Timer(rounds, sample_s=0.005, most_s=1.0, wait_each=True)


# ---------------------------------------------------------------------------------------------
# What a device does while the host enqueues

_HOLD_PRODUCTS, _HOLD_SIZE = 20, 4096  # about 4 ms on an H100


@functools.cache
def jax_hold() -> Callable[[], Any]:
    def products(a: jax.Array) -> jax.Array:
        for _ in range(_HOLD_PRODUCTS):
            a = jnp.matmul(a, a) * _HOLD_SIZE**-0.5  # what is random stays of its size
        return a

    a = jax.random.normal(jax.random.key(0), (_HOLD_SIZE, _HOLD_SIZE), jnp.bfloat16)
    compiled = jax.jit(products).lower(a).compile()
    return lambda: compiled(a)


@functools.cache
def torch_hold(torch: Any) -> Callable[[], Any]:
    source = torch.randn(_HOLD_SIZE, _HOLD_SIZE, dtype=torch.bfloat16, device="cuda")

    def products() -> Any:
        a = source
        for _ in range(_HOLD_PRODUCTS):
            a = a @ a * _HOLD_SIZE**-0.5
        return a

    return products


# ---------------------------------------------------------------------------------------------
# Ceilings

HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def jax_runner(fun: Callable[..., Any], *args: Any) -> Runner:
    compiled = jax.jit(fun).lower(*args).compile()
    return Runner(lambda: compiled(*args), jax.block_until_ready)


def _torch_runner(torch: Any, fun: Callable[..., Any], *args: Any) -> Runner:
    wait = torch.cuda.synchronize if args[0].is_cuda else lambda: None
    return Runner(lambda: fun(*args), lambda _: wait())


def matmul_peak(timer: Timer, torch: Any, platform: str, dtype: str, precision: Any) -> float:
    """FLOP/s of the fastest large matrix product: jax's, or torch's where torch is there."""
    size = 8192 if platform == "cuda" else 2048 if dtype == "float32" else 512
    # Not zeros or ones, with which a GPU draws less power and keeps a higher clock.
    a, b = (
        jax.random.normal(jax.random.key(seed), (size, size), jnp.float32).astype(dtype)
        for seed in (0, 1)
    )
    runners = {"jax": jax_runner(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)}
    if torch is not None:
        torch.backends.cuda.matmul.allow_tf32 = precision is None
        ta, tb = torch.from_dlpack(a), torch.from_dlpack(b)
        runners["torch"] = _torch_runner(torch, torch.matmul, ta, tb)
    best = 0.0
    for name, runner in runners.items():
        runner.once()
        best = max(best, 2 * size**3 / timer.time({name: runner})[name].least)
    return best


def copy_bandwidth(timer: Timer, torch: Any, platform: str) -> float:
    """Bytes read and written a second by the fastest large copy."""
    elements = 2**29 if platform == "cuda" else 2**26
    x = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)
    runners = {"jax": jax_runner(lambda x: -x, x)}
    if torch is not None:
        source = torch.from_dlpack(x)
        runners["torch"] = _torch_runner(torch, torch.empty_like(source).copy_, source)
    best = 0.0
    for name, runner in runners.items():
        runner.once()
        best = max(best, 2 * 4 * elements / timer.time({name: runner})[name].least)
    return best


def ceilings(
    timer: Timer, torch: Any, platform: str, dtypes: Mapping[str, tuple[str, Any]]
) -> dict[str, float]:
    """{"copy": bytes/s, dtype: FLOP/s} for the named (array dtype, precision).

    On a GPU full-precision float32 can be had from three TF32 products too, so its ceiling is that
    of the faster way.
    """
    result = {"copy": copy_bandwidth(timer, torch, platform)}
    for name, (dtype, precision) in dtypes.items():
        result[name] = matmul_peak(timer, torch, platform, dtype, precision)
        if platform == "cuda" and dtype == "float32" and precision is not None:
            tf32 = matmul_peak(timer, torch, platform, "float32", None)
            result[name] = max(result[name], tf32 / 3)
    return result


# ---------------------------------------------------------------------------------------------
# What a call costs besides the operation


def call_overhead() -> dict[str, dict[str, float]]:
    """Microseconds of a jitted call on a tiny problem, and milliseconds to compile it: jaxconv's,
    lax's, and a function's that only adds 1."""
    x, w = jnp.ones((1, 4, 8)), jnp.ones((4, 4, 3))
    spec = ConvSpec(
        in_size=(8,),
        out_size=(10,),
        kernel_size=(3,),
        stride=(1,),
        padding=(0,),
        dilation=(1,),
        groups=1,
        channels_last=False,
        stack=0,
        precision=None,
        out_dtype=None,
        implementation=None,
    )
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "jaxconv": lambda x, w: primitive.forward(x, w, None, spec),
        "lax": lambda x, w: lax.conv_transpose(
            x, w, (1,), "VALID", dimension_numbers=("NCH", "IOH", "NCH")
        ),
        "x + 1": lambda x, w: x + 1,
    }
    calls = 2000
    result: dict[str, dict[str, float]] = {}
    for name, fun in functions.items():
        start = time.perf_counter()
        jax.jit(fun).lower(x, w).compile()
        compile_ms = 1e3 * (time.perf_counter() - start)
        jitted = jax.jit(fun)
        jax.block_until_ready(jitted(x, w))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            out = None
            for _ in range(calls):
                out = jitted(x, w)
            jax.block_until_ready(out)
            times.append(1e6 * (time.perf_counter() - start) / calls)
        result[name] = {"us": min(times), "compile_ms": compile_ms}
    return result
