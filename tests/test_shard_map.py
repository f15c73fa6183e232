"""Inside jax.shard_map, on four CPU devices: the same values and gradients as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import cases
import jaxconv

CASES = [
    cases.case("1d", 4, 4, 6, 1, (7,), 4, 3, 1, 1),
    cases.case("grouped", 4, 8, 8, 4, (3, 2, 4), 3, 2, 1, 1),
]


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cpu")[:4]
    assert len(devices) == 4
    return jax.sharding.Mesh(np.array(devices), ("batch",))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_batch_split_over_devices(mesh, c, bias, check_vma):
    op = jaxconv.conv_transpose1d if c.rank == 1 else jaxconv.conv_transpose3d
    x, w, _, b = (jnp.asarray(a) for a in c.arrays())
    parameters = (w, b) if bias else (w,)
    split, whole = PartitionSpec("batch"), PartitionSpec()

    def layer(x, parameters):
        return jnp.sin(op(x, *parameters, **c.arguments()))

    def apply(x, parameters):
        return jax.shard_map(
            layer, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=check_vma
        )(x, parameters)

    def loss(f, x, parameters):
        return (f(x, parameters) ** 2).sum()

    with jax.default_device(jax.devices("cpu")[0]):
        wanted, wanted_grads = jax.value_and_grad(lambda *a: loss(layer, *a), (0, 1))(x, parameters)
        sharded = jax.jit(jax.value_and_grad(lambda *a: loss(apply, *a), (0, 1)))
        value, grads = sharded(x, parameters)
        text = sharded.lower(x, parameters).compile().as_text()
    # Sums over the batch are taken in another order: float64 roundings of a few thousand terms.
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), grads, wanted_grads
    )
    assert text is not None
    assert "jaxconv_weight_grad" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_gradient_inside(mesh, c):
    """The gradient by a replicated weight, taken inside, is the sum over all devices, once."""
    op = jaxconv.conv_transpose1d if c.rank == 1 else jaxconv.conv_transpose3d
    x, w, _, _ = (jnp.asarray(a) for a in c.arrays())

    def grad(x, w):
        return jax.grad(lambda w: jnp.sin(op(x, w, **c.arguments())).sum())(w)

    split, whole = PartitionSpec("batch"), PartitionSpec()
    inside = jax.shard_map(grad, mesh=mesh, in_specs=(split, whole), out_specs=whole)
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_allclose(jax.jit(inside)(x, w), grad(x, w), rtol=1e-9, atol=1e-11)
