"""Settings that all tests share, and the platforms that they run on."""

import os
from typing import Any

# Before jaxconv is loaded: kernels get outputs and workspaces full of NaN.
os.environ["JAXCONV_POISON"] = "1"
# Eight devices to share work among, on any machine.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same problems in every run; JAXCONV_TEST_FRESH=1 draws new ones.
hypothesis.settings.register_profile(
    "jaxconv",
    deadline=None,
    derandomize=os.environ.get("JAXCONV_TEST_FRESH") != "1",
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("jaxconv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="fail, rather than skip, what needs a CUDA device or the CUDA kernels",
    )


def _cuda_device() -> Any:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_functions():
    """Thousands of compiled problems would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def cuda_missing(request: pytest.FixtureRequest):
    """Called with what a test on CUDA lacks: skips it, or fails it under --require-cuda."""

    def missing(what: str) -> None:
        if request.config.getoption("--require-cuda"):
            pytest.fail(what)
        pytest.skip(what)

    return missing


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def platform(request: pytest.FixtureRequest, cuda_missing):
    """Runs a test with the CPU's kernels and with CUDA's."""
    from jaxconv import ffi

    if request.param == "cpu":
        device = jax.devices("cpu")[0]
    else:
        device = _cuda_device()
        if device is None:
            cuda_missing("no CUDA device")
        if "cuda" not in ffi.built_platforms():
            cuda_missing("jaxconv was built without its CUDA kernels")
    with jax.default_device(device):
        yield request.param
