"""Learning with the precisions of an accelerator's products: ``python -m experiments.precision [--seeds N] [--out F]``.

Trains OW-QMIX on the demo's small predator-prey, on a CPU; set ``JAX_PLATFORMS=cpu`` if there is another device. A CPU
multiplies float32 matrices in float32, so the products of an accelerator are emulated: the operands of every product of
a layer's inputs and weights, in the forward and in the backward pass, are rounded as there, and the products are summed
in float32.

- ``float32``: as they are.
- ``tensorfloat32``: to 11 bits, as GPUs do with ``matmul_precision=tensorfloat32`` or ``bfloat16``.
- ``bfloat16_3x``: each operand is split into two bfloat16 numbers, and the product of the two smaller ones is left
  out, as TPUs do with ``matmul_precision=tensorfloat32``.
- ``bfloat16``: to 8 bits, as TPUs do with ``matmul_precision=bfloat16``.
- ``compute_dtype``: not emulated, the option ``compute_dtype=bfloat16``.

Writes one JSON line per precision.
"""

import contextlib
import functools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.examples.demo import NARROW, TASKS
from wqmix_jax import load_config, train_seeds
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count
from wqmix_jax.networks import linear
from wqmix_jax.types import Array

Product = Callable[[Array, Array], Array]

EXPONENT_BITS = 8
STORED_BITS = {"bfloat16": 7, "tensorfloat32": 10}
"""Stored bits of a mantissa; its first bit isn't stored."""

OPTIONS = ("+algo=ow_qmix", *NARROW["ow_qmix"], *TASKS["predator_prey"].overrides)


@command
def main() -> None:
    """Trains with each precision in a separate process, one after another, and writes the lines."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("--seeds", type=count, default=8, help="how many seeds train with each precision")
    parser.add_argument("--out", type=Path, help="a file for the lines; by default they are printed")
    args = parser.parse_args()
    lines = []
    for precision in PRECISIONS:
        # A separate process, because JAX keeps what it has traced, products included.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            lines.append(json.dumps(pool.submit(measured, precision, args.seeds).result()))
        if args.out is None:
            print(lines[-1], flush=True)
        else:
            args.out.write_text("\n".join([*lines, ""]))


def measured(precision: str, num_seeds: int, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Trains with one precision.

    Returns:
        The largest error of one product in units of its largest element, and the greedy returns of each seed by
        evaluation.
    """
    multiply = PRECISIONS[precision]
    narrow = "bfloat16" if precision == "compute_dtype" else "float32"
    config = load_config(*OPTIONS, f"compute_dtype={narrow}", *options)
    with replaced_products(multiply):
        _, records = train_seeds(config, range(num_seeds), progress=False)
    evals = [record for record in records if record["kind"] == "eval"]
    returns = [[record["episode_return"] for record in evals if record["seed"] == seed] for seed in range(num_seeds)]
    return {
        "precision": precision,
        "product_error": product_error(multiply if narrow == "float32" else bfloat16_operands),
        "returns": [[round(value, 4) for value in seed] for seed in returns],
    }


@contextlib.contextmanager
def replaced_products(multiply: Product) -> Iterator[None]:
    """Replaces the nets' product while programs are traced, in every module that has imported it."""
    own = linear.product
    product = own if multiply is exact else rounded_product(multiply)
    users: Any = [module for module in list(sys.modules.values()) if getattr(module, "product", None) is own]
    for module in users:
        module.product = product
    try:
        yield
    finally:
        for module in users:
            module.product = own


def rounded_product(multiply: Product) -> Product:
    """Returns a product whose gradients are products of the same kind: ``[.., I]``, ``[I, F]`` -> ``[.., F]``."""

    @jax.custom_vjp
    def product(inputs: Array, kernel: Array) -> Array:
        return multiply(inputs, kernel)

    def backward(operands: tuple[Array, Array], d_outputs: Array) -> tuple[Array, Array]:
        inputs, kernel = operands
        rows, d_rows = inputs.reshape(-1, inputs.shape[-1]), d_outputs.reshape(-1, d_outputs.shape[-1])
        return multiply(d_outputs, kernel.T), multiply(rows.T, d_rows)

    product.defvjp(lambda inputs, kernel: (multiply(inputs, kernel), (inputs, kernel)), backward)
    return product


def exact(inputs: Array, kernel: Array) -> Array:
    """Returns the product in float32."""
    return jnp.matmul(inputs, kernel)


def rounded(name: str, numbers: Array) -> Array:
    """Rounds to the nearest numbers of the type."""
    return jax.lax.reduce_precision(numbers, EXPONENT_BITS, STORED_BITS[name])


def rounded_operands(name: str, inputs: Array, kernel: Array) -> Array:
    """Returns the product of rounded operands."""
    return exact(rounded(name, inputs), rounded(name, kernel))


def three_products(inputs: Array, kernel: Array) -> Array:
    """Returns the product of operands that are split into two bfloat16 parts each, without that of the small parts."""
    (large, small), (kernel_large, kernel_small) = map(_parts, (inputs, kernel))
    return exact(large, kernel_large) + (exact(large, kernel_small) + exact(small, kernel_large))


def _parts(numbers: Array) -> tuple[Array, Array]:
    large = rounded("bfloat16", numbers)
    return large, rounded("bfloat16", numbers - large)


def product_error(multiply: Product) -> float:
    """Returns the largest error of ``[512, 64] x [64, 192]`` normal numbers, in units of the largest exact element."""
    rng = np.random.default_rng(0)
    inputs, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((512, 64), (64, 192)))
    true = inputs.astype(np.float64) @ kernel.astype(np.float64)
    error = np.abs(np.asarray(jax.jit(multiply)(inputs, kernel), np.float64) - true).max()
    return float(f"{error / np.abs(true).max():.2g}")


bfloat16_operands = functools.partial(rounded_operands, "bfloat16")

PRECISIONS: dict[str, Product] = {
    "float32": exact,
    "tensorfloat32": functools.partial(rounded_operands, "tensorfloat32"),
    "bfloat16_3x": three_products,
    "bfloat16": bfloat16_operands,
    "compute_dtype": exact,
}

if __name__ == "__main__":
    main()
