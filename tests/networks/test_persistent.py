"""The kernels in Pallas' interpret mode, compared with the scan; and compiled for devices that are not there."""

import importlib
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.linear import LinearWeights
from wqmix_jax.networks.persistent import persistent_utilities
from wqmix_jax.networks.persistent_kernels import KernelOptions
from wqmix_jax.networks.recurrent import GRUWeights, encoded_unroll

ROWS = {"tpu": 128, "gpu": 16}
HAS_MASKED_LOADS = hasattr(importlib.import_module("jax.experimental.pallas.triton"), "load")
for_gpu = pytest.mark.skipif(not HAS_MASKED_LOADS, reason="Pallas' Triton of jax 0.7.0 has no masked loads")
PLATFORMS = ["tpu", pytest.param("gpu", marks=for_gpu)]


def nets_and_inputs(nets=3, steps=7, rows=20, width=9, hidden=16, actions=5, dtype="float32", seeds=()):
    """Encoders, units, heads, carries ``[G, R, H]``, features ``[T, R, I]`` and a weight for each utility."""
    shapes = [(width, hidden), (hidden,), (hidden, 3 * hidden), (hidden, 3 * hidden), (3 * hidden,), (3 * hidden,)]
    shapes = [(nets, *shape) for shape in [*shapes, (hidden, actions), (actions,), (rows, hidden)]]
    shapes += [(steps, rows, width), (nets, steps, rows, actions)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [0.3 * jax.random.normal(key, (*seeds, *shape), dtype) for key, shape in zip(keys, shapes, strict=True)]
    return LinearWeights(*arrays[:2]), GRUWeights(*arrays[2:6]), LinearWeights(*arrays[6:8]), *arrays[8:]


def scanned_utilities(encoder, unit, head, carry, features, num_places):
    outputs = []
    for net in range(len(carry)):
        one_encoder, one_unit, (kernel, bias) = jax.tree.map(lambda leaf, net=net: leaf[net], (encoder, unit, head))
        hiddens = encoded_unroll(one_encoder, one_unit, carry[net], features, None, num_places)
        outputs.append(jnp.matmul(hiddens.astype(kernel.dtype), kernel, preferred_element_type=hiddens.dtype))
        outputs[-1] += bias[None, None]
    return jnp.stack(outputs)


def results(utilities, num_trained):
    """A function of the arguments that returns the utilities and the trained nets' gradients."""

    def evaluate(encoder, unit, head, carry, features, target, num_places):
        def value(*weights):
            outputs = utilities(*weights, features, num_places)
            return (outputs[:num_trained] * target[:num_trained]).sum(), outputs

        return jax.grad(value, argnums=(0, 1, 2, 3), has_aux=True)(encoder, unit, head, carry)

    return evaluate


def assert_close(ours, expected, tolerance):
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1, np.abs(other).max()))


def kernel(platform, num_trained=2, **more):
    options = KernelOptions(platform, num_trained, **{"rows": ROWS[platform], "steps": 2, "interpret": True, **more})
    return lambda *args: persistent_utilities(options, *args)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-13)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_kernel_equals_the_scan(platform, dtype, tolerance):
    """Values and gradients, also where a sequence ends early: within a block of time, and with it."""
    with jax.enable_x64(dtype == "float64"):
        args = nets_and_inputs(dtype=dtype)
        ours, expected = (jax.jit(results(utilities, 2)) for utilities in (kernel(platform), scanned_utilities))
        for num_places in jnp.array([1, 4, 5, 7], "int32"):
            assert_close(ours(*args, num_places), expected(*args, num_places), tolerance)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_kernel_takes_an_axis_of_seeds(platform):
    """Also with one net, and without a gradient, where no hidden state is stored."""
    args, num_places = nets_and_inputs(nets=1, seeds=(2,)), jnp.int32(5)
    ours, expected = (results(utilities, 1) for utilities in (kernel(platform, 1), scanned_utilities))
    over_seeds = jax.jit(jax.vmap(ours, in_axes=(0,) * 6 + (None,)))
    each = [jax.jit(expected)(*jax.tree.map(lambda leaf, seed=seed: leaf[seed], args), num_places) for seed in range(2)]
    assert_close(over_seeds(*args, num_places), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), 1e-6)
    one = jax.tree.map(lambda leaf: leaf[0], args[:-1])
    assert_close(jax.jit(kernel(platform, 1))(*one, num_places), each[0][1], 1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_kernel_multiplies_narrow_matrices(platform):
    """With bfloat16 kernels, sums are float32 and the gradients have the kernels' dtype."""
    *nets, carry, features, target = nets_and_inputs()
    nets = jax.tree.map(lambda leaf: leaf.astype("bfloat16") if leaf.ndim > 2 else leaf, nets)
    args = *nets, carry, features, target, jnp.int32(7)
    ours, expected = (jax.jit(results(utilities, 2))(*args) for utilities in (kernel(platform), scanned_utilities))
    assert_close(ours, expected, 2e-2)


def test_nets_without_gradients_have_none():
    *nets, carry, features, target = nets_and_inputs()
    utilities = kernel("tpu", 1)
    grads = jax.grad(lambda nets: (utilities(*nets, carry, features, jnp.int32(7)) * target).sum())(nets)
    for grad in jax.tree.leaves(grads):
        assert jnp.any(grad[0])
        assert not jnp.any(grad[1:])


def test_a_gpu_needs_powers_of_two():
    *args, _ = nets_and_inputs(hidden=24)
    with pytest.raises(ValueError, match=r"^hidden_dim=24: must be a power of two"):
        kernel("gpu")(*args, jnp.int32(7))


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_kernel_equals_the_scan_at_full_size(platform):
    """OW-QMIX on predator-prey: three nets, 201 places, 32 episodes of eight agents."""
    args = nets_and_inputs(3, 201, 256, 89, 64)
    ours = kernel(platform, rows=256 if platform == "tpu" else 16, steps=8)
    ours, expected = (jax.jit(results(utilities, 2)) for utilities in (ours, scanned_utilities))
    for num_places in jnp.array([113, 201], "int32"):
        assert_close(ours(*args, num_places), expected(*args, num_places), 1e-5)


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 1 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The compiler's description of the device."""

TOPOLOGIES = {
    "tpu": 'platform="tpu", topology_name="v5e:2x2"',
    "gpu": 'platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100',
}

COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tests.networks.test_persistent import H100, kernel, nets_and_inputs, results

sharding = SingleDeviceSharding(topologies.get_topology_desc({topology}).devices[0])
utilities = kernel({platform!r}, rows={rows}, steps=8, interpret=False)
args = jax.eval_shape(lambda: (*nets_and_inputs(3, 201, 256, 89, 64, seeds=(2,)), jnp.int32(7)))
args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args)
compiled = jax.jit(jax.vmap(results(utilities, 2), in_axes=(0,) * 6 + (None,))).lower(*args).compile()
text = compiled.as_text()
print(text.count(" while("), compiled.memory_analysis().temp_size_in_bytes / 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "package"), [("tpu", "libtpu"), ("gpu", "jax_cuda13_plugin")])
def test_kernel_compiles_for_a_device_that_is_not_there(platform, package):
    """For a TPU v5e and an H100: no loop is left outside the kernels, and a seed needs less than 60 MB."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} isn't installed: the extras `cuda` and `tpu` have the compilers")
    code = COMPILE.format(platform=platform, rows={"tpu": 256, "gpu": 16}[platform], topology=TOPOLOGIES[platform])
    instance = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **instance, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loops, temporaries = done.stdout.split()
    assert int(loops) == 0
    assert float(temporaries) < 60e6
