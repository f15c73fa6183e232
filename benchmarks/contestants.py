"""The contestants of a benchmark: jaxconv, and torch and lax at each setting worth trying.

All read the same random numbers. A contestant is prepared into a runner, whose first output can be
brought to one form (channels first, the weight as (ci, co // g, *k)) and compared.
"""

import dataclasses
import fnmatch
import functools
import importlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import lax
from timing import Runner

from jaxconv import ffi, primitive
from jaxconv.spec import ConvSpec
from workloads import RESULTS, Pass, Role, Workload

LAYOUTS = ("channels_first", "channels_last")
LAX_VARIANTS = ("dilate-first", "dilate-last", "pad-first", "pad-last")

# torch reuses the cuDNN plan of the first call of a problem, however `benchmark` is set since. So
# few plans are kept, and pushed out by other problems when the setting changes.
TORCH_PLANS = 4

# A GPU's L2 holds up to 126 MB; the inputs and outputs of one round are at least twice that.
ROTATED_BYTES = 2**28
MOST_SETS = 64


def import_torch() -> Any:
    """torch, or None where it is not installed."""
    os.environ["TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT"] = str(TORCH_PLANS)
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None


# ---------------------------------------------------------------------------------------------
# Arrays: torch tensors where there is torch, which makes and compares large arrays without
# compiling anything and shares them with jax; NumPy arrays where there is none.


class TorchArrays:
    def __init__(self, torch: Any, platform: str) -> None:
        self.torch = torch
        self.generator = torch.Generator(platform).manual_seed(0)

    def normal(self, shape: Sequence[int], dtype: str) -> Any:
        values = self.torch.randn(
            shape, generator=self.generator, device=self.generator.device, dtype=self.torch.float32
        )
        return values.to(getattr(self.torch, dtype))

    def move(self, a: Any, source: Any, destination: Any) -> Any:
        return a.movedim(source, destination).contiguous()

    def flip(self, a: Any, axes: Sequence[int]) -> Any:
        return a.flip(tuple(axes))

    def to_jax(self, a: Any) -> jax.Array:
        if a.is_cuda:
            self.torch.cuda.synchronize()
        return jax.dlpack.from_dlpack(a)

    def from_jax(self, a: jax.Array) -> Any:
        return self.torch.from_dlpack(jax.block_until_ready(a))

    def like(self, a: Any, other: Any) -> Any:
        return a.to(other.dtype)


class NumpyArrays:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def normal(self, shape: Sequence[int], dtype: str) -> Any:
        values = self.generator.standard_normal(shape, np.float32)
        return values.astype(jnp.dtype(dtype))

    def move(self, a: Any, source: Any, destination: Any) -> Any:
        return np.ascontiguousarray(np.moveaxis(a, source, destination))

    def flip(self, a: Any, axes: Sequence[int]) -> Any:
        return np.flip(a, tuple(axes))

    def to_jax(self, a: Any) -> jax.Array:
        return jnp.asarray(a)

    def from_jax(self, a: jax.Array) -> Any:
        return np.asarray(a)

    def like(self, a: Any, other: Any) -> Any:
        return a.astype(other.dtype)


class Data:
    """Sets of random x, w and y (as its cotangent) of a workload, in every form asked for."""

    def __init__(
        self, workload: Workload, dtype: str, platform: str, arrays: TorchArrays | NumpyArrays
    ) -> None:
        self.arrays = arrays
        size = workload.least_bytes(jnp.dtype(dtype).itemsize)
        self.sets = min(MOST_SETS, math.ceil(ROTATED_BYTES / size))
        # A GPU runs all sets in one executable. On a CPU their operations could then overlap.
        self.batch = self.sets if platform == "cuda" else 1
        self._forms: dict[tuple[Role, str], list[Any]] = {
            (role, ""): [arrays.normal(workload.shape(role), dtype) for _ in range(self.sets)]
            for role in ("x", "w", "y")
        }

    def form(self, role: Role, name: str, make: Callable[[Any], Any], of: str = "") -> list[Any]:
        """Each set's array of the form `of` under `make`, made once for each name."""
        if (role, name) not in self._forms:
            self._forms[role, name] = [make(a) for a in self._forms[role, of]]
        return self._forms[role, name]

    def last(self, role: Role) -> str:
        """The name of the form with channels last, (n, *sizes, c)."""
        self.form(role, "last", lambda a: self.arrays.move(a, 1, -1))
        return "last"

    def batches(self, x: list[Any], w: list[Any], y: list[Any]) -> list[list[Any]]:
        """What one run takes: as many sets (x, w, y) as belong in it."""
        sets = list(zip(x, w, y, strict=True))
        return [sets[i : i + self.batch] for i in range(0, len(sets), self.batch)]

    def first(self, role: Role) -> Any:
        return self._forms[role, ""][0]


# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contestant:
    owner: str
    variant: str
    layout: str
    prepare: Callable[[], Runner]
    """Compiles, and allocates what the runner needs; the runner lets go of it."""
    results: Callable[[Any], list[Any]]
    """What the first set gave, in the one form, from what a runner's enqueue returns."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured, of one workload."""

    workload: Workload
    pass_: Pass
    dtype: str
    precision: Any
    platform: str
    data: Data

    @property
    def roles(self) -> tuple[Role, ...]:
        return RESULTS[self.pass_]

    @property
    def arrays(self) -> TorchArrays | NumpyArrays:
        return self.data.arrays


def _jax_runner(case: Case, operation: Callable[..., Any], batches: list[list[Any]]) -> Runner:
    def run(batch: list[Any], previous: list[Any]) -> list[Any]:
        return [operation(*arrays) for arrays in batch]

    rotated = itertools.cycle(batches)
    if case.platform != "cuda":
        separate = jax.jit(lambda batch: run(batch, [])).lower(batches[0]).compile()
        return Runner(lambda: separate(next(rotated)), jax.block_until_ready, case.data.batch)

    # Results take the place of the ones before, as a training step's do. Where addresses change,
    # XLA updates its CUDA graphs, and small layers then measure the host.
    step = jax.jit(run, donate_argnums=1, keep_unused=True)
    shapes = jax.eval_shape(lambda batch: run(batch, []), batches[0])
    out = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    compiled = step.lower(batches[0], out).compile()

    def enqueue() -> Any:
        nonlocal out
        out = compiled(next(rotated), out)
        return out

    return Runner(enqueue, jax.block_until_ready, case.data.batch, timing.jax_hold())


def _jax_activations(case: Case, role: Role, layout: str) -> list[Any]:
    arrays = case.arrays
    if layout == "channels_first":
        return case.data.form(role, "jax first", arrays.to_jax)
    return case.data.form(role, "jax last", arrays.to_jax, of=case.data.last(role))


def _one_form(case: Case, role: Role, a: Any, layout: str) -> Any:
    a = case.arrays.from_jax(a)
    return case.arrays.move(a, -1, 1) if layout == "channels_last" and role != "w" else a


def _spec(case: Case, layout: str, implementation: str | None = None) -> ConvSpec:
    return ConvSpec(
        **case.workload.spec_arguments(),
        channels_last=layout == "channels_last",
        precision=case.precision,
        out_dtype=None,
        implementation=implementation,
    )


# ---------------------------------------------------------------------------------------------
# jaxconv


def ours(case: Case, layout: str, implementation: str | None) -> Contestant:
    spec = _spec(case, layout, implementation)
    compute: dict[Role, Callable[..., Any]] = {
        "y": lambda x, w, y: primitive.forward(x, w, None, spec),
        "x": lambda x, w, y: primitive.input_grad(y, w, spec),
        "w": lambda x, w, y: primitive.weight_grad(x, y, spec),
    }

    def operation(x: Any, w: Any, y: Any) -> list[Any]:
        return [compute[role](x, w, y) for role in case.roles]

    def prepare() -> Runner:
        x, y = (_jax_activations(case, role, layout) for role in ("x", "y"))
        w = case.data.form("w", "jax first", case.arrays.to_jax)
        return _jax_runner(case, operation, case.data.batches(x, w, y))

    def results(out: Any) -> list[Any]:
        return [
            _one_form(case, role, a, layout) for role, a in zip(case.roles, out[0], strict=True)
        ]

    return Contestant("ours", implementation or "chosen", layout, prepare, results)


def kernel_name(case: Case, layout: str, implementation: str | None) -> str:
    """The kernels that jaxconv runs for the case, in the order of its results."""
    spec = _spec(case, layout, implementation)
    types = {
        role: jax.ShapeDtypeStruct(
            case.workload.shape(role, spec.channels_last), jnp.dtype(case.dtype)
        )
        for role in ("x", "w", "y")
    }
    dtype = types["x"].dtype
    names = []
    for role in case.roles:
        if implementation == "xla" or ffi.refusal(case.platform, [dtype, dtype], dtype, spec):
            names.append("xla")
        else:
            names.append(
                ffi.choose(case.platform, role, **types, out=types[role], bias=False, spec=spec)[0]
            )
    return names[0] if len(set(names)) == 1 else "+".join(names)


# ---------------------------------------------------------------------------------------------
# lax


def _lax_weight(case: Case, layout: str, w: Any) -> Any:
    """(co, ci // g, *k), flipped, or channels last (*k, ci // g, co): what a user of lax holds."""
    shape, arrays = case.workload, case.arrays
    w = w.reshape(shape.g, shape.ci // shape.g, shape.co // shape.g, *shape.k).swapaxes(1, 2)
    w = w.reshape(shape.co, shape.ci // shape.g, *shape.k)
    w = arrays.flip(w, range(2, 2 + shape.rank))
    return arrays.move(w, (0, 1), (-1, -2) if layout == "channels_last" else (0, 1))


def _from_lax_weight(case: Case, layout: str, w: Any) -> Any:
    shape, arrays = case.workload, case.arrays
    w = arrays.from_jax(w)
    if layout == "channels_last":
        w = arrays.move(w, (-1, -2), (0, 1))
    w = arrays.flip(w, range(2, 2 + shape.rank))
    w = w.reshape(shape.g, shape.co // shape.g, shape.ci // shape.g, *shape.k).swapaxes(1, 2)
    return w.reshape(shape.ci, shape.co // shape.g, *shape.k)


def _lax_operation(case: Case, layout: str, way: str) -> Callable[..., list[Any]]:
    spec = _spec(case, layout)
    letters = "DHW"[3 - spec.rank :]
    if spec.channels_last:
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    else:
        numbers = (f"NC{letters}", f"OI{letters}", f"NC{letters}")

    def forward(x: Any, w: Any) -> Any:
        dilation = spec.stride
        if way == "pad":
            interior = iter(s - 1 for s in spec.stride)
            pads = [(0, 0, next(interior) if c in letters else 0) for c in numbers[0]]
            x, dilation = lax.pad(x, jnp.zeros((), x.dtype), pads), (1,) * spec.rank
        return lax.conv_general_dilated(
            x,
            w,
            window_strides=(1,) * spec.rank,
            padding=spec.lax_padding(),
            lhs_dilation=dilation,
            rhs_dilation=spec.dilation,
            dimension_numbers=numbers,
            feature_group_count=spec.groups,
            precision=spec.precision,
        )

    def operation(x: Any, w: Any, y: Any) -> list[Any]:
        if case.pass_ == "forward":
            return [forward(x, w)]
        if case.pass_ == "input_grad":
            return [*jax.vjp(lambda x: forward(x, w), x)[1](y)]
        if case.pass_ == "weight_grad":
            return [*jax.vjp(lambda w: forward(x, w), w)[1](y)]
        out, vjp = jax.vjp(forward, x, w)
        return [out, *vjp(y)]

    return operation


def _lax_results(case: Case, layout: str, out: list[Any]) -> list[Any]:
    return [
        _from_lax_weight(case, layout, a) if role == "w" else _one_form(case, role, a, layout)
        for role, a in zip(case.roles, out, strict=True)
    ]


def lax_peer(case: Case, variant: str) -> Contestant:
    """What lax.conv_transpose emits, with groups, or ("pad-...") the same with the zeros between
    the inputs put there by lax.pad, which can be faster. Gradients are its VJP."""
    way, end = variant.split("-")
    layout = f"channels_{end}"

    def prepare() -> Runner:
        x, y = (_jax_activations(case, role, layout) for role in ("x", "y"))
        w = case.data.form(
            "w", f"lax {end}", lambda a: case.arrays.to_jax(_lax_weight(case, layout, a))
        )
        operation = _lax_operation(case, layout, way)
        return _jax_runner(case, operation, case.data.batches(x, w, y))

    def results(out: Any) -> list[Any]:
        return _lax_results(case, layout, out[0])

    return Contestant("lax", variant, layout, prepare, results)


# ---------------------------------------------------------------------------------------------
# torch


def _torch_form(case: Case, role: Role, layout: str, of: str = "") -> list[Any]:
    """Tensors as torch takes them. torch has no channels-last format for one spatial axis, so there
    it gets a second one, of size 1, as its users do."""
    if layout == "channels_first":
        return case.data.form(role, of, lambda a: a)

    def view(a: Any) -> Any:
        a = a.movedim(-1, 1)
        return a.unsqueeze(2) if case.workload.rank == 1 else a

    if of:
        return case.data.form(
            role, f"torch last {of}", lambda a: view(a.movedim(1, -1).contiguous()), of
        )
    return case.data.form(role, "torch last", view, of=case.data.last(role))


def _torch_dense(case: Case, torch: Any, w: Any) -> Any:
    """A grouped weight (ci, co // g, *k) as the block-diagonal (ci, co, *k)."""
    shape = case.workload
    dense = torch.zeros(
        (shape.g, shape.ci // shape.g, shape.g, *w.shape[1:]), dtype=w.dtype, device=w.device
    )
    group = torch.arange(shape.g, device=w.device)
    dense[group, :, group] = w.reshape(shape.g, -1, *w.shape[1:])
    return dense.reshape(shape.ci, shape.co, *shape.k)


def _from_torch_dense(case: Case, torch: Any, w: Any) -> Any:
    shape = case.workload
    w = w.reshape(shape.g, shape.ci // shape.g, shape.g, shape.co // shape.g, *shape.k)
    group = torch.arange(shape.g, device=w.device)
    return w[group, :, group].reshape(shape.ci, shape.co // shape.g, *shape.k)


def _torch_operation(
    case: Case, torch: Any, layout: str, dense: bool, x: Any, w: Any, y: Any
) -> list[Any]:
    shape = case.workload
    stride, padding, dilation, extra = (list(v) for v in (shape.s, shape.p, shape.d, shape.op))
    if layout == "channels_last" and shape.rank == 1:
        stride, padding, dilation, extra = [1, *stride], [0, *padding], [1, *dilation], [0, *extra]
    groups = 1 if dense else shape.g
    how = (stride, padding, dilation, True, extra, groups)
    out = []
    if "y" in case.roles:
        out.append(torch.ops.aten.convolution(x, w, None, *how))
    mask = ["x" in case.roles, "w" in case.roles, False]
    if any(mask):
        grads = torch.ops.aten.convolution_backward(y, x, w, None, *how, mask)
        out += [g for g, wanted in zip(grads, mask, strict=True) if wanted]
    return out


def _torch_runner(
    case: Case, torch: Any, operation: Callable[..., Any], batches: list[list[Any]]
) -> Runner:
    def run(batch: list[Any]) -> list[Any]:
        with torch.no_grad():
            return [operation(*arrays) for arrays in batch]

    if case.platform == "cpu":
        rotated = itertools.cycle(batches)
        return Runner(lambda: run(next(rotated)), lambda _: None, case.data.batch)

    # A CUDA graph, so that neither Python nor torch's dispatch is timed. cuDNN chooses its
    # algorithms in the runs before, outside the capture.
    (batch,) = batches
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(batch[:1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads of XLA go on, and what they call would end a capture that watches all threads.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run(batch)

    def replay() -> Any:
        graph.replay()
        return out

    hold = timing.torch_hold(torch)
    return Runner(replay, lambda _: torch.cuda.synchronize(), case.data.batch, hold)


def torch_peer(case: Case, torch: Any, layout: str, benchmark: bool, dense: bool) -> Contestant:
    names = [layout.removeprefix("channels_")]
    if case.platform == "cuda":
        names.append("benchmark" if benchmark else "heuristic")
    names += ["dense"] if dense else []

    def prepare() -> Runner:
        _set_torch(torch, tf32=case.precision is None, benchmark=benchmark)
        weight = ""
        if dense:
            weight = "dense"
            case.data.form("w", weight, functools.partial(_torch_dense, case, torch))
        x, y = (_torch_form(case, role, layout) for role in ("x", "y"))
        w = _torch_form(case, "w", layout, of=weight)
        operation = functools.partial(_torch_operation, case, torch, layout, dense)
        return _torch_runner(case, torch, operation, case.data.batches(x, w, y))

    def results(out: Any) -> list[Any]:
        found = []
        for role, a in zip(case.roles, out[0], strict=True):
            if layout == "channels_last" and case.workload.rank == 1:
                a = a.squeeze(2)
            found.append(_from_torch_dense(case, torch, a) if dense and role == "w" else a)
        return found

    return Contestant("torch", "-".join(names), layout, prepare, results)


def _set_torch(torch: Any, *, tf32: bool, benchmark: bool) -> None:
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        weight = torch.ones(8, 8, 3, 3, device="cuda")
        for size in range(8, 8 + TORCH_PLANS):
            torch.nn.functional.conv2d(torch.ones(1, 8, size, size, device="cuda"), weight)
    torch.backends.cudnn.benchmark = benchmark


def peers(
    case: Case, names: Sequence[str], torch: Any, variants: Sequence[str]
) -> list[Contestant]:
    """The named peers at every setting that one of the globs matches, as "torch-VARIANT" or
    "lax-VARIANT"; those first that are fast most often."""
    found = []
    if "torch" in names:
        expand = (False, True) if case.workload.g > 1 else (False,)
        modes = (True, False) if case.platform == "cuda" else (False,)
        found += [
            torch_peer(case, torch, layout, benchmark, dense)
            for benchmark in modes
            for dense in expand
            for layout in LAYOUTS
        ]
    if "lax" in names:
        strided = any(s > 1 for s in case.workload.s)
        found += [lax_peer(case, v) for v in LAX_VARIANTS if strided or not v.startswith("pad")]
    return [c for c in found if any(fnmatch.fnmatch(f"{c.owner}-{c.variant}", v) for v in variants)]


# ---------------------------------------------------------------------------------------------
# Right or wrong


def _rounds_to_tf32(case: Case) -> bool:
    return case.platform == "cuda" and case.dtype == "float32" and case.precision is None


def reference(case: Case, role: Role, torch: Any) -> Any:
    """One result for the first set, from the same numbers by torch or, where that is absent, lax.

    It is computed in float32 with no TF32, and by torch in float64 where the case itself is in
    full float32. A weight gradient's images are added in float64.
    """
    (pass_,) = (p for p, roles in RESULTS.items() if roles == (role,))
    first = [case.data.first(r) for r in ("x", "w", "y")]
    full = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    exact = dataclasses.replace(case, pass_=pass_, precision=full)
    if torch is not None:
        _set_torch(torch, tf32=False, benchmark=False)
        same = case.dtype == "float32" and not _rounds_to_tf32(case)
        wide = torch.float64 if same else torch.float32
        operation = functools.partial(_torch_operation, exact, torch, "channels_first", False)
        with torch.no_grad():
            x, w, y = (a.to(wide) for a in first)
            if role != "w":
                return operation(x, w, y)[0]
            # Millions of terms: image by image, so that float32 sums are short ones.
            images = (operation(x[i : i + 1], w, y[i : i + 1])[0] for i in range(len(x)))
            return sum(image.double() for image in images)
    first[1] = _lax_weight(case, "channels_first", first[1])
    x, w, y = (case.arrays.to_jax(a).astype(jnp.float32) for a in first)
    out = jax.jit(_lax_operation(exact, "channels_first", "dilate"))(x, w, y)
    return _lax_results(exact, "channels_first", out)[0]


def relative_error(case: Case, out: Any, expected: Any) -> float:
    """The error's norm over the result's."""
    error = case.arrays.like(out, expected) - expected
    return math.sqrt(float((error * error).sum()) / float((expected * expected).sum()))


def error_over_bound(case: Case, role: Role, out: Any, expected: Any) -> float:
    """The largest error of a result, as a share of the bound for its dtype and number of terms.

    Inputs are standard normal, so a sum of T products has a standard deviation of r = sqrt(T).
    Operands that are rounded by at most u each give its error one of at most sqrt(2) * u * r, and
    T additions in float32, each rounded by at most 2^-24 of a partial sum, one of at most
    2^-24 * sqrt(T) * r. No element of some 10^9 errs by more than 7 such deviations. Rounding the
    result adds its own unit of the result.
    """
    terms = case.workload.terms(role)
    if case.dtype != "float32":
        operand = 0.0  # Products of 16-bit numbers are exact in float32.
    else:
        operand = 2.0**-11 if _rounds_to_tf32(case) else 2.0**-24
    deviation = math.sqrt(terms) * (math.sqrt(2) * operand + 2.0**-24 * math.sqrt(terms))
    rounding = float(jnp.finfo(case.dtype).eps) / 2
    error = abs(case.arrays.like(out, expected) - expected)
    return float((error / (7 * deviation + rounding * abs(expected))).max())
