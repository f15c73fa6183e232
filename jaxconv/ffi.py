"""The compiled modules: loading, registration with XLA, kernel choice, and FFI attributes."""

import functools
import importlib
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jaxconv import xla_model
from jaxconv.spec import MAX_AXES, ConvSpec, Role
from jaxconv.version import __version__

# The platforms that have kernels: the compiled module and XLA's name for the platform.
_XLA_PLATFORM = {"cpu": "cpu", "cuda": "CUDA"}

# The operation that computes y, x or w, as the C++ side counts and names it.
PASS_NAME: dict[Role, str] = {"y": "forward", "x": "input_grad", "w": "weight_grad"}
_PASS: dict[Role, int] = {"y": 0, "x": 1, "w": 2}
_DTYPE = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
_DEFAULT, _HIGHEST = 0, 1

# What `implementation` may be besides the name of a kernel.
PLATFORM_IMPLEMENTATIONS = ("cpu", "cuda")


def _runtime_api_version() -> tuple[int, int]:
    """The FFI version of the jaxlib that is installed, from the headers that it carries."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(m.group(1)) if m else -1 for m in found)
    return major, minor


def _check_version(module: ModuleType) -> None:
    """Refuses handlers that this jaxlib would not take: registering one would disable the whole
    backend, with a message that does not name jaxconv."""
    if __version__ != module.VERSION:
        raise ImportError(
            f"jaxconv {__version__} found compiled modules of version {module.VERSION} "
            f"({module.__file__}): install it again"
        )
    built, runtime = module.XLA_FFI_API_VERSION, _runtime_api_version()
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise ImportError(
            f"jaxconv was built with XLA FFI {built[0]}.{built[1]}, but jaxlib "
            f"{jaxlib.version.__version__} has {runtime[0]}.{runtime[1]}: build jaxconv with the "
            "oldest jaxlib that it is to run with (pip does so, unless --no-build-isolation is "
            "given)"
        )


def _target(result: Role) -> str:
    return f"jaxconv_{PASS_NAME[result]}"


EXPORT_DISABLED_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(_target(result)) for result in PASS_NAME
)
"""What jax.export.export wants as `disabled_checks`, since custom calls are trusted by name alone:
jaxconv keeps the meaning of its calls from release to release."""


def _load(platform: str) -> ModuleType | None:
    """Imports and registers jaxconv._cpu or jaxconv._cuda; None if it was not built."""
    name = f"jaxconv._{platform}"
    if importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    _check_version(module)
    handlers = module.handlers()
    for result in PASS_NAME:
        jax.ffi.register_ffi_target(
            _target(result), handlers[PASS_NAME[result]], platform=_XLA_PLATFORM[platform]
        )
    return module


_MODULES = {platform: _load(platform) for platform in _XLA_PLATFORM}

if _MODULES["cpu"] is None:
    raise ImportError(
        f"jaxconv was imported from {pathlib.Path(__file__).parent}, which has no compiled "
        "modules, and no installed jaxconv has them either: install it with `pip install .`, or in "
        "place with `pip install -e .`"
    )


def module(platform: str) -> ModuleType:
    """The compiled module of a platform that was built."""
    found = _MODULES[platform]
    if found is None:
        raise ValueError(f"jaxconv was built without kernels for {platform}")
    return found


def built_platforms() -> tuple[str, ...]:
    """The platforms whose kernels this installation has."""
    return tuple(platform for platform, found in _MODULES.items() if found is not None)


@functools.cache
def _device(platform: str) -> Any:
    """What the choice of a kernel may depend on: the first local device, or, where there is none
    (lowering for another machine), the least that the kernels are compiled for."""
    if platform == "cpu":
        return module(platform).Device(threads=os.cpu_count() or 1)
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return module(platform).Device(compute_capability=80, multiprocessors=108)
    major, minor = str(device.compute_capability).split(".")
    return module(platform).Device(
        compute_capability=10 * int(major) + int(minor), multiprocessors=device.core_count
    )


def _precision(spec: ConvSpec, dtype: np.dtype) -> int | None:
    """The kernels' precision for a canonical lax precision; None for one that they do not have."""
    if dtype != np.float32 or spec.precision is None:
        return _DEFAULT
    if isinstance(spec.precision, tuple):
        highest = jax.lax.Precision.HIGHEST in spec.precision
        return _HIGHEST if highest else _DEFAULT
    presets = jax.lax.DotAlgorithmPreset
    return {
        presets.DEFAULT: _DEFAULT,
        presets.TF32_TF32_F32: _DEFAULT,
        presets.F32_F32_F32: _HIGHEST,
    }.get(spec.precision)


def _sizes(values: Sequence[int], fill: int) -> list[int]:
    """One value for each of the kernels' three axes."""
    return [fill] * (MAX_AXES - len(values)) + list(values)


def refusal(platform: str, dtypes: Sequence[Any], out_dtype: Any, spec: ConvSpec) -> str | None:
    """Why no kernel of a platform can take the problem, whatever its sizes; None if one may."""
    if _MODULES.get(platform) is None:
        return f"jaxconv was built without kernels for {platform}"
    if any(np.dtype(d).name not in _DTYPE for d in dtypes) or dtypes[0] != dtypes[1]:
        return f"kernels take float32, bfloat16, float16 and float64, not {dtypes[0]}, {dtypes[1]}"
    narrow = np.dtype(dtypes[0]).itemsize == 2
    if out_dtype != dtypes[0] and not (narrow and out_dtype == np.float32):
        return f"kernels do not give {out_dtype} from {dtypes[0]}"
    if _precision(spec, np.dtype(dtypes[0])) is None:
        return f"kernels do not have the precision {spec.precision}"
    return None


def _problem(
    platform: str, result: Role, x: Any, w: Any, y: Any, out: Any, bias: bool, spec: ConvSpec
) -> Any:
    """The native description of one problem of the stack, from the shapes of x, w and y."""
    operand = y if result == "x" else x
    channel = -1 if spec.channels_last else -1 - spec.rank
    batch = x.shape[spec.stack : x.ndim - 1 - spec.rank]
    return module(platform).Problem(
        pass_=_PASS[result],
        in_dtype=_DTYPE[operand.dtype.name],
        out_dtype=_DTYPE[out.dtype.name],
        precision=_precision(spec, operand.dtype),
        channels_last=spec.channels_last,
        bias=bias,
        n=int(np.prod(batch, dtype=np.int64)),
        ci=x.shape[channel],
        co=y.shape[channel],
        groups=spec.groups,
        isize=_sizes(spec.in_size, 1),
        osize=_sizes(spec.out_size, 1),
        k=_sizes(spec.kernel_size, 1),
        stride=_sizes(spec.stride, 1),
        dilation=_sizes(spec.dilation, 1),
        pad=_sizes(spec.padding, 0),
    )


def verdicts(
    platform: str, result: Role, x: Any, w: Any, y: Any, out: Any, bias: bool, spec: ConvSpec
) -> list[tuple[str, str, float, int]]:
    """What every kernel of the platform says of a problem: its name, why it refuses (empty if it
    does not), the seconds it expects to take and the bytes of workspace it wants."""
    problem = _problem(platform, result, x, w, y, out, bias, spec)
    return module(platform).verdicts(problem, _device(platform))


def kernel_names(platform: str, result: Role) -> list[str]:
    """The names of all kernels of an operation."""
    return module(platform).kernel_names(_PASS[result])


def choose(
    platform: str, result: Role, x: Any, w: Any, y: Any, out: Any, bias: bool, spec: ConvSpec
) -> tuple[str, int]:
    """The kernel that runs the problem and the workspace that XLA allocates for it, in bytes.

    Where the batch is symbolic the name is empty: a kernel is chosen at each call, among those that
    need no workspace of XLA's. "xla" is XLA's own convolution: chosen on a GPU, if nothing is
    forced, where only "direct" takes the problem and XLA is expected to be faster.
    """
    batch = x.shape[spec.stack : x.ndim - 1 - spec.rank]
    if not all(isinstance(d, int) for d in (*batch, *x.shape[: spec.stack])):
        return "", 0
    problem = _problem(platform, result, x, w, y, out, bias, spec)
    forced = spec.implementation
    name = "" if forced is None or forced in PLATFORM_IMPLEMENTATIONS else forced
    chosen = module(platform).choose(problem, _device(platform), name)
    rows = module(platform).verdicts(problem, _device(platform))
    if forced is None and platform == "cuda" and chosen == "direct":
        operand = y if result == "x" else x
        expected = xla_model.seconds(result, x.shape, w.shape, operand.dtype.name, spec)
        if expected < math.inf:
            rows = [*rows, ("xla", "", expected, 0)]
        if expected < min(seconds for name, _, seconds, _ in rows if name == "direct"):
            chosen = "xla"
    if os.environ.get("JAXCONV_EXPLAIN") == "1":
        _explain(platform, result, x.shape, w.shape, y.shape, out.dtype.name, spec, chosen, rows)
    if not chosen:
        why = "; ".join(f"{n} {r or 'takes it'}" for n, r, _, _ in rows)
        raise ValueError(
            f"jaxconv: implementation={forced!r} cannot run the {PASS_NAME[result]} of "
            f"x {x.shape}, w {w.shape}, y {y.shape} on {platform}; its kernels: {why}"
        )
    # On a CPU the handler has memory of its own, kept between calls.
    workspace = 0 if platform == "cpu" else max(ws for n, _, _, ws in rows if n == chosen)
    return chosen, workspace


_explained: set[tuple[Any, ...]] = set()


def _explain(platform: str, result: Role, *problem: Any) -> None:
    """Prints, once a problem, what every kernel says of it."""
    *key, chosen, rows = problem
    if (platform, result, *key) in _explained:
        return
    _explained.add((platform, result, *key))
    x, w, y, dtype, spec = key
    lines = [
        f"jaxconv {platform} {PASS_NAME[result]}: x {x}, w {w}, y {y} {dtype}, stride "
        f"{spec.stride}, padding {spec.padding}, dilation {spec.dilation}, groups {spec.groups}"
    ]
    for name, why, seconds, workspace in rows:
        mark = "->" if name == chosen else "  "
        says = f"no: {why}" if why else f"{1e6 * seconds:.1f} us expected, {workspace} B workspace"
        lines.append(f" {mark} {name}: {says}")
    print("\n".join(lines), file=sys.stderr)


def call(result: Role, out: Any, spec: ConvSpec, kernel: str, workspace: int) -> Any:
    """The FFI call of a kernel, a function of the operands that gives `out` and, if it wants some,
    its workspace."""
    results = [jax.ShapeDtypeStruct(out.shape, out.dtype)]
    if workspace > 0:
        results.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))

    def run(*operands: Any) -> Any:
        precision = _precision(spec, np.dtype(operands[0].dtype))
        assert precision is not None
        return jax.ffi.ffi_call(_target(result), results)(
            *operands,
            stride=np.array(spec.stride, np.int64),
            dilation=np.array(spec.dilation, np.int64),
            pad=np.array(spec.padding, np.int64),
            groups=spec.groups,
            stack=spec.stack,
            channels_last=int(spec.channels_last),
            precision=precision,
            kernel=kernel,
        )[0]

    return run
