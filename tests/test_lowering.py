"""What is compiled for each platform, looked at without running it."""

import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import ad

import cases
import jaxconv
from jaxconv import ffi, primitive
from jaxconv.spec import ConvSpec
from workloads import select

X = jax.ShapeDtypeStruct((2, 8, 6, 7), jnp.float32)
W = jax.ShapeDtypeStruct((8, 3, 3, 3), jnp.float32)


def lowered(platform: str, x: Any = X, w: Any = W, **arguments: Any) -> str:
    def loss(x, w):
        return jaxconv.conv_transpose2d(x, w, stride=2, groups=2, **arguments).sum()

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return gradients.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture(params=["cpu", "cuda"])
def built(request, cuda_missing):
    if request.param not in ffi.built_platforms():
        cuda_missing("jaxconv was built without its CUDA kernels")
    return request.param


def test_kernels_for_each_platform(built):
    text = lowered(built)
    for name in ffi.PASS_NAME.values():
        assert len(re.findall(rf"stablehlo.custom_call @jaxconv_{name}\(", text)) == 1
    assert "stablehlo.convolution" not in text
    assert "transpose" not in text.replace("conv_transpose", "")  # no copy to another layout


def test_channels_last_is_native(built):
    x = jax.ShapeDtypeStruct((2, 6, 7, 8), jnp.float32)
    text = lowered(built, x=x, data_format="channels_last")
    assert "custom_call @jaxconv_forward" in text
    assert "transpose" not in text.replace("conv_transpose", "")


def test_other_platforms_and_dtypes_lower_to_lax(built):
    assert "jaxconv_forward(" not in lowered("tpu")
    assert "stablehlo.convolution" in lowered("tpu")
    int8 = [jax.ShapeDtypeStruct(s.shape, jnp.int8) for s in (X, W)]
    text = jax.jit(jaxconv.conv_transpose2d).trace(*int8).lower(lowering_platforms=(built,))
    assert "stablehlo.convolution" in text.as_text()


def test_xla_can_be_forced(built):
    assert "custom_call @jaxconv" not in lowered(built, implementation="xla")


def test_xla_runs_what_only_the_slow_kernel_takes(cuda_missing):
    if "cuda" not in ffi.built_platforms():
        cuda_missing("jaxconv was built without its CUDA kernels")
    (workload,) = select(["gan3d_64_1"])
    x, w = (jax.ShapeDtypeStruct(workload.shape(role), jnp.float32) for role in ("x", "w"))

    def text(**arguments: Any) -> str:
        def run(x, w):
            return jaxconv.conv_transpose3d(x, w, **workload.arguments(), **arguments)

        return jax.jit(run).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()

    # One output channel in full precision.
    assert "stablehlo.convolution" in text(precision="highest")
    assert 'kernel = "direct"' in text(precision="highest", implementation="cuda")
    # A small problem takes less than XLA's launches.
    x = jax.ShapeDtypeStruct((1, *x.shape[1:2], 2, 2, 2), jnp.float32)
    assert 'kernel = "direct"' in text(precision="highest")


def test_a_name_forces_a_kernel(built):
    text = lowered(built, implementation="direct")
    assert len(re.findall(r'kernel = "direct"', text)) == 3


@pytest.mark.parametrize(("capability", "wanted"), [(80, "mma"), (90, "dense"), (100, "mma")])
@pytest.mark.parametrize("result", ["y", "x"])
def test_the_kernel_depends_on_the_device(cuda_missing, monkeypatch, result, capability, wanted):
    if "cuda" not in ffi.built_platforms():
        cuda_missing("jaxconv was built without its CUDA kernels")
    device = ffi.module("cuda").Device(compute_capability=capability, multiprocessors=132)
    monkeypatch.setattr(ffi, "_device", lambda platform: device)
    c = cases.case("", 4, 64, 128, 1, (64, 128), 3, 1, 1)
    shapes = {"x": (4, 64, 128, 64), "w": c.w_shape, "y": (4, 64, 128, 128)}
    avals = {role: jax.ShapeDtypeStruct(shape, jnp.float32) for role, shape in shapes.items()}
    spec = c.spec(channels_last=True)
    rows = ffi.verdicts("cuda", result, out=avals[result], bias=False, spec=spec, **avals)
    seconds = {name: time for name, refusal, time, _ in rows if not refusal}
    assert min(seconds, key=seconds.__getitem__) == wanted


@pytest.mark.parametrize(
    ("name", "result", "dtype", "wanted"),
    [
        ("s2_kb68", "x", "float32", "blocks"),
        ("s3_kb58", "y", "float32", "fold"),
        ("s1_kb73", "y", "float32", "grouped"),
        ("kb57", "y", "bfloat16", "dense"),
        ("s3_kb58", "w", "bfloat16", "across"),
        ("depthwise3d", "w", "float32", "depthwise"),
        ("gan3d_64_1", "y", "float32", "thin"),
    ],
)
def test_the_kernel_depends_on_the_layer(cuda_missing, monkeypatch, name, result, dtype, wanted):
    if "cuda" not in ffi.built_platforms():
        cuda_missing("jaxconv was built without its CUDA kernels")
    device = ffi.module("cuda").Device(compute_capability=90, multiprocessors=132)
    monkeypatch.setattr(ffi, "_device", lambda platform: device)
    (workload,) = select([name])
    avals = {
        role: jax.ShapeDtypeStruct(workload.shape(role, channels_last=True), jnp.dtype(dtype))
        for role in ("x", "w", "y")
    }
    spec = ConvSpec(
        **workload.spec_arguments(),
        channels_last=True,
        precision=None,
        out_dtype=None,
        implementation=None,
    )
    kernel, _ = ffi.choose("cuda", result, out=avals[result], bias=False, spec=spec, **avals)
    assert kernel == wanted


def test_what_is_forced_and_cannot_run_is_an_error():
    cases = [
        ("tpu", {"implementation": "cuda"}, "no kernels for this platform"),
        ("tpu", {"implementation": "direct"}, "no kernels for this platform"),
        ("cpu", {"implementation": "nonsense"}, "its kernels: .*direct takes it"),
    ]
    for platform, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            lowered(platform, **arguments)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(ValueError, match="kernels take float32"),
    ):
        jaxconv.conv_transpose1d(
            jnp.ones((1, 1, 3), "int32"), jnp.ones((1, 1, 1), "int32"), implementation="cpu"
        )


def test_every_primitive_has_derivatives():
    for p in (*primitive._SETTLED, *primitive._SETTLED.values()):
        assert p in ad.primitive_jvps
        assert p in ad.primitive_transposes


def test_explain(capfd, monkeypatch):
    monkeypatch.setenv("JAXCONV_EXPLAIN", "1")
    monkeypatch.setattr(ffi, "_explained", set())
    x, w = jnp.ones((1, 2, 11), "float32"), jnp.ones((2, 2, 3), "float32")
    with jax.default_device(jax.devices("cpu")[0]):
        for _ in range(2):
            jaxconv.conv_transpose1d(x, w, stride=2)
    printed = capfd.readouterr().err
    assert printed.count("jaxconv cpu forward: x (1, 2, 11)") == 1
    assert re.search(r"-> \w+: .* us expected", printed)


def source_folder(tmp_path: pathlib.Path) -> str:
    """A copy of jaxconv without its compiled modules, as a checkout has it, and the start of a
    program in which Python finds it first (an editable installation's finder comes before that)."""
    source = tmp_path / "jaxconv"
    source.mkdir()
    for file in pathlib.Path(ffi.__file__).parent.glob("*.py"):
        (source / file.name).write_text(file.read_text())
    return (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'skbc' not in str(type(f))]; "
        f"sys.path.insert(0, {str(tmp_path)!r}); "
    )


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_source_folder_uses_what_is_installed(tmp_path):
    start = source_folder(tmp_path)
    found = run(start + "import jaxconv; print(jaxconv.ffi.__file__)")
    assert found.returncode == 0, found.stderr
    assert str(tmp_path) in found.stdout


def test_source_folder_alone_says_what_to_do(tmp_path):
    start = source_folder(tmp_path)
    start += "import jax; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
    start += "import importlib.metadata as m; m.version = lambda _: '0'; "
    failed = run(start + "import jaxconv")
    assert failed.returncode != 0
    assert "has no compiled modules" in failed.stderr
    assert "pip install ." in failed.stderr
