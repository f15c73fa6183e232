"""Full-size layers on a GPU against torch on the same GPU, in every precision."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import oracle
from jaxconv import primitive
from jaxconv.spec import Role
from workloads import WORKLOADS

LAYERS = {w.name: w for w in WORKLOADS if w.set == "seed"}
ROLES: tuple[Role, ...] = ("y", "x", "w")
PRECISIONS = {  # the dtype of the data, the precision asked for, and the roundoff of a product
    "float32": ("float32", jax.lax.Precision.HIGHEST, 0.0),
    "tf32": ("float32", jax.lax.Precision.DEFAULT, 2 * oracle.TF32_ROUNDOFF),
    "bfloat16": ("bfloat16", jax.lax.Precision.DEFAULT, 0.0),
}


def torch_operation(torch: Any, result: Role, c: Any, a: Any, b: Any) -> Any:
    """The operation in torch, from tensors in the order of primitive.OPERANDS."""
    pad = [before for before, _ in c.p]
    op = getattr(torch.nn.functional, f"conv_transpose{c.rank}d")
    if result == "y":
        return op(a, b, None, c.s, pad, c.op, c.g, c.d)
    # The forward is linear in x and in w: its gradients do not depend on their values.
    x = a if result == "w" else a.new_zeros(c.x_shape)
    w = b if result == "x" else a.new_zeros(c.w_shape)
    variable = (x if result == "x" else w).requires_grad_()
    y = op(x, w, None, c.s, pad, c.op, c.g, c.d)
    return torch.autograd.grad(y, variable, a if result == "x" else b)[0]


@pytest.mark.parametrize("result", ROLES)
@pytest.mark.parametrize("name", LAYERS)
def test_seed_layers_agree_with_torch(name, result, cuda_missing):
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        cuda_missing("no CUDA device")
    try:
        import torch
    except ImportError:
        cuda_missing("torch is not installed")
    if not torch.cuda.is_available():
        cuda_missing("torch has no CUDA device")
    c = cases.of(LAYERS[name])
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"x": c.x_shape, "w": c.w_shape, "y": c.y_shape}
    inputs = [
        torch.randn(shapes[role], generator=generator, device="cuda").bfloat16()
        for role in primitive.OPERANDS[result]
    ]
    # In float64: the truth, the sum of the terms' sizes, and the number of terms, which is at most
    # that of an inner pixel.
    wide = [v.double() for v in inputs]
    wanted = torch_operation(torch, result, c, *wide).detach()
    sizes = torch_operation(torch, result, c, *(v.abs() for v in wide)).detach()
    pixels = c.n * int(np.prod(c.i))
    terms = {"w": pixels, "y": c.ci // c.g * np.prod(c.k), "x": c.co // c.g * np.prod(c.k)}[result]
    for dtype, precision, roundoff in PRECISIONS.values():
        run = jax.jit(
            functools.partial(
                primitive._PRIMITIVES[result].bind, spec=c.spec(precision=(precision, precision))
            )
        )
        operands = [
            jax.device_put(np.asarray(v.float().cpu().numpy()), device).astype(dtype)
            for v in inputs
        ]
        actual = torch.from_dlpack(run(*operands).astype(jnp.float32)).double()
        allowed = ((4 * terms**0.5 + 4) * oracle.ROUNDOFF["float32"] + roundoff) * sizes
        allowed += oracle.ROUNDOFF[dtype] * (wanted.abs() + allowed) + 1e-30
        excess = ((actual - wanted).abs() / allowed).nan_to_num(torch.inf)
        assert excess.max() <= 1, f"{name} {result} {dtype}: {excess.max():.3g} of the bound"


@pytest.mark.parametrize(
    ("kernel", "dtype", "channels_last"),
    [
        *itertools.product(["mma", "dense"], ["float32", "bfloat16"], [False, True]),
        ("across", "bfloat16", True),
    ],
)
def test_sums_over_millions_of_pixels_stay_exact(kernel, dtype, channels_last, cuda_missing):
    """The tensor cores cut off what they add to a sum: over positive terms that adds up.

    The data repeat, so that the result is that of one period, as often as there are periods.
    """
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        cuda_missing("no CUDA device")
    if kernel != "mma" and device.compute_capability != "9.0":
        pytest.skip("the kernel is for compute capability 9.0")
    taps, period, periods = 15, 4096, 1024
    c = cases.case("", 1, 64, 64, 1, (period * periods,), taps)
    rng = np.random.default_rng(0)
    # Values of 8 bits: their products are exact in TF32, too.
    x, y = (np.abs(rng.standard_normal((64, period))).astype(jnp.bfloat16) for _ in range(2))
    wide = [v.astype(np.float64) for v in (x, y)]
    wanted = periods * np.stack(
        [wide[0] @ np.roll(wide[1], -t, axis=1).T for t in range(taps)], axis=-1
    )
    spec = c.spec(channels_last=channels_last, out_dtype="float32", implementation=kernel)

    @jax.jit
    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = (
            jnp.tile(v, (1, periods + 1))[None, :, :size] for v, size in ((x, c.i[0]), (y, c.o[0]))
        )
        if channels_last:
            x, y = jnp.moveaxis(x, 1, -1), jnp.moveaxis(y, 1, -1)
        return primitive.weight_grad(x.astype(dtype), y.astype(dtype), spec)

    actual = np.asarray(run(jax.device_put(x, device), jax.device_put(y, device)), np.float64)
    # Between two flushes 1024 products are added, each of which may lose a unit in the last place
    # of the sum, 2**-23; sums of flushes and parts are rounded, which is less than a half more.
    assert np.abs(actual / wanted - 1).max() < 1.5 * 1024 * 2**-23
