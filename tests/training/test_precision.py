"""`matmul_precision` reaches every product of a run, and has the same meaning on every platform that can choose."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.environments import Clock, tiny_run, tiny_wqmix
from tests.topologies import tpu_devices
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.devices import jax_precision

LEVELS = {"float32": "HIGHEST", "tensorfloat32": "HIGH", "bfloat16": "DEFAULT"}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", LEVELS)
def test_every_product_of_a_run_has_its_precision(precision: str, platform: str) -> None:
    """Those of the gradients and of both forms of the recurrent part too; a CPU's programs keep the level's name."""
    config = tiny_run(tiny_wqmix(), Clock(episode_limit=4, ends_from=1), matmul_precision=precision)
    trainer = make_trainer(config, platform=platform)
    state = jax.eval_shape(lambda: trainer.init([0]))
    for lowered in (trainer.train.lower(state, np.int32(1)), trainer.evaluate.lower(state)):  # type: ignore[attr-defined]
        products = re.findall(r"stablehlo\.dot_general.*", lowered.as_text())
        assert products
        assert all(f"precision = [{LEVELS[precision]}, {LEVELS[precision]}]" in line for line in products)


@pytest.mark.parametrize("name", LEVELS)
def test_tensorfloat32_is_what_it_says_on_a_gpu(name: str) -> None:
    assert [jax_precision(name, platform) for platform in ("cpu", "tpu")] == [name, name]
    assert jax_precision(name, "gpu") == ("float32" if name == "float32" else "bfloat16")


@pytest.mark.slow
def test_a_tpu_takes_six_three_or_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's estimate of the cycles of one large product; bfloat16 matrices need one pass in any case."""
    sharding = SingleDeviceSharding(tpu_devices("v5e:2x2", monkeypatch)[0])

    def cycles(precision: str, dtype: str) -> int:
        matrix = jax.ShapeDtypeStruct((2048, 2048), dtype, sharding=sharding)
        with jax.default_matmul_precision(jax_precision(precision, "tpu")):
            multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
            program = multiply.lower(matrix, matrix).compile().as_text()
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program)))

    one = cycles("bfloat16", "float32")
    assert cycles("tensorfloat32", "float32") / one == pytest.approx(3, rel=0.1)
    assert cycles("float32", "float32") / one == pytest.approx(6, rel=0.1)
    assert cycles("float32", "bfloat16") / one == pytest.approx(1, rel=0.1)
