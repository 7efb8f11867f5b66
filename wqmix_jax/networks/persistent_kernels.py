"""The kernels of `persistent_utilities`, forward and backward, for a TPU (Mosaic) and a GPU (Triton).

Rows are the last axis inside, ``[.., H, R]``: they fill a TPU's 128 lanes, where ``H = 64`` would leave half of them
empty and pad every array in memory to twice its size, and a gate is a slice of whole registers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.types import Array


class KernelOptions(NamedTuple):
    """The static choices of a kernel.

    Attributes:
        platform: ``tpu`` (Pallas' Mosaic) or ``gpu`` (Pallas' Triton, which jax 0.11 deprecates; masked loads are
            missing from jax 0.7.0).
        num_trained: the nets that have gradients, the first of the ``G``.
        rows: the rows that one program of the grid computes, at most: a multiple of 128 for a TPU, a power of two of
            16 or more for a GPU.
        steps: the time steps whose inputs a TPU loads together.
        warps: the warps of one program of a GPU.
        interpret: whether the kernel runs as ordinary operations, on any device.
    """

    platform: str
    num_trained: int
    rows: int
    steps: int = 4
    warps: int = 8
    interpret: bool = False


class KernelWeights(NamedTuple):
    """Kernels and biases of ``G`` nets, ``[G, out, in]`` and ``[G, out, 1]``; in a kernel, references to one net's."""

    encoder: Any
    encoder_bias: Any
    inputs: Any
    inputs_bias: Any
    hidden: Any
    hidden_bias: Any
    head: Any
    head_bias: Any


def padding(options: KernelOptions, size: int) -> int:
    """Returns how much larger a block is than an array along an axis: Triton's have powers of two from 16."""
    return 0 if options.platform == "tpu" else max(16, 1 << (size - 1).bit_length()) - size


# The arithmetic of a step, for both platforms. A TPU multiplies the three gates' kernels together; Triton has no arrays
# of 3H rows, as 3 is no power of two.


def _dot(lhs: Array, rhs: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Returns the product of matrices in the dtype of ``lhs``, summed and returned in that of ``rhs``."""
    dims = ((contract[:1], contract[1:]), ((), ()))
    precision = jax.lax.Precision.HIGHEST if lhs.dtype == rhs.dtype else None
    return jax.lax.dot_general(lhs, rhs.astype(lhs.dtype), dims, precision, preferred_element_type=rhs.dtype)


def _loaded(options: KernelOptions, leaves: list[Any], height: int) -> KernelWeights:
    """Returns the values of references as lists of parts, which follow each other along the first axis."""

    def parts(leaf: Any) -> list[Array]:
        if options.platform == "tpu" or len(leaf) != 3 * height:
            return [leaf[...]]
        return [leaf[gate * height : (gate + 1) * height, :] for gate in range(3)]

    return KernelWeights(*map(parts, leaves))


class _Step(NamedTuple):
    """The values of a step, ``[F, R]`` and ``[H, R]``; ``hidden_new`` is the hidden state's term in the new gate."""

    encoded: Array
    reset: Array
    update: Array
    new: Array
    hidden_new: Array
    hidden: Array


def _step(weights: KernelWeights, before: Array, features: Array) -> _Step:
    """Takes a step with the weights of `_loaded`: the hidden state before it ``[H, R]``, features ``[I, R]``."""

    def gates(kernel: list[Array], bias: list[Array], inputs: Array) -> list[Array]:
        products = [_dot(part, inputs) + part_bias for part, part_bias in zip(kernel, bias, strict=True)]
        return products if len(products) == 3 else jnp.split(products[0], 3)

    encoded = jnp.maximum(_dot(weights.encoder[0], features) + weights.encoder_bias[0], 0)
    input_reset, input_update, input_new = gates(weights.inputs, weights.inputs_bias, encoded)
    hidden_reset, hidden_update, hidden_new = gates(weights.hidden, weights.hidden_bias, before)
    reset, update = jax.nn.sigmoid(input_reset + hidden_reset), jax.nn.sigmoid(input_update + hidden_update)
    new = jnp.tanh(input_new + reset * hidden_new)
    return _Step(encoded, reset, update, new, hidden_new, (1 - update) * new + update * before)


def _step_back(
    options: KernelOptions, weights: KernelWeights, before: Array, features: Array, d_later: Array, d_outputs: Array
) -> tuple[Array, list[list[Array]]]:
    """Backpropagates through a step.

    Args:
        options: see `KernelOptions`.
        weights: those of `_loaded`.
        before: ``[H, R]``, the hidden state before the step.
        features: ``[I, R]``.
        d_later: ``[H, R]``, the gradient with respect to the hidden state after the step, as it comes from later ones.
        d_outputs: ``[A, R]``, the gradient with respect to the utilities.

    Returns:
        The gradient with respect to ``before``, and the step's terms of the sums, see `backward_call`, each as parts
        that follow each other along the first axis.
    """
    encoded, reset, update, new, hidden_new, hidden = _step(weights, before, features)

    def together(parts: list[Array]) -> list[Array]:
        return [jnp.concatenate(parts)] if options.platform == "tpu" else parts

    def back(kernel: list[Array], parts: list[Array]) -> Array:
        return functools.reduce(jnp.add, [_dot(one, part, (0, 0)) for one, part in zip(kernel, parts, strict=True)])

    def outer(parts: list[Array], inputs: Array) -> list[Array]:
        return [_dot(part.astype(weights.encoder[0].dtype), inputs, (1, 1)) for part in parts]

    d_hidden = d_later + _dot(weights.head[0], d_outputs, (0, 0))
    d_new = d_hidden * (1 - update) * (1 - new * new)
    d_update = d_hidden * (before - new) * update * (1 - update)
    d_reset = d_new * hidden_new * reset * (1 - reset)
    d_hidden_new = d_new * reset
    from_inputs, from_hidden = (together([d_reset, d_update, last]) for last in (d_new, d_hidden_new))
    d_encoded = jnp.where(encoded > 0, back(weights.inputs, from_inputs), 0)
    d_kernels = [outer([d_encoded], features), outer(from_inputs, encoded), outer(from_hidden, before)]
    terms = [[d_reset, d_update, d_new, d_hidden_new], [d_encoded], *d_kernels, outer([d_outputs], hidden)]
    return d_hidden * update + back(weights.hidden, from_hidden), terms


# A TPU's kernels. The grid's last axis is blocks of time: while one is computed, the next one's inputs are loaded.


def _tpu_forward(num_places: Any, *refs: Any, options: KernelOptions) -> None:
    from jax.experimental import pallas as pl

    (features, *leaves, carry, outputs), hiddens, state = refs[:11], refs[11:-1], refs[-1]
    trained, first = pl.program_id(0) < options.num_trained, pl.program_id(2) * options.steps
    head_bias = leaves[-1]

    @pl.when(first == 0)
    def _() -> None:
        state[...] = carry[...]

    @pl.when(first < num_places[0])
    def _() -> None:
        hidden = state[...]
        for offset in range(options.steps):
            weights = _loaded(options, leaves, len(hidden))
            hidden = _step(weights, hidden, features[offset]).hidden
            hidden = jnp.where(first + offset < num_places[0], hidden, 0)
            outputs[offset] = _dot(weights.head[0], hidden) + weights.head_bias[0]
            for ref in hiddens:
                ref[offset] = jnp.where(trained, hidden, ref[offset])
        state[...] = hidden

    @pl.when(first >= num_places[0])
    def _() -> None:
        outputs[...] = jnp.broadcast_to(head_bias[...][None], outputs.shape)


def _tpu_backward(num_places: Any, *refs: Any, options: KernelOptions) -> None:
    from jax.experimental import pallas as pl

    (features, *leaves, carry, previous, hiddens, d_outputs), sums = refs[:-7], refs[-7:]
    d_carry = sums[2]
    first = (pl.num_programs(2) - 1 - pl.program_id(2)) * options.steps

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    @pl.when(first < num_places[0])
    def _() -> None:
        d_later = d_carry[...]
        for offset in reversed(range(options.steps)):
            # Steps that aren't taken hold anything, also NaN where the last block of time is longer than the arrays.
            taken = first + offset < num_places[0]
            before = hiddens[offset - 1] if offset else jnp.where(first == 0, carry[...], previous[0])
            inputs = (jnp.where(taken, array, 0) for array in (before, features[offset], d_later, d_outputs[offset]))
            d_later, terms = _step_back(options, _loaded(options, leaves, len(before)), *inputs)
            for ref, parts in zip((*sums[:2], *sums[3:]), terms, strict=True):
                ref[...] += jnp.concatenate(parts)
        d_carry[...] = d_later


# A GPU's kernels. One program loops over all of time. Its weights are loaded before the loop and stay in shared memory,
# its sums in registers. Blocks have powers of two as dimensions, also where arrays end earlier: the rest reads as 0.


def _are_within(ref: Any, size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, ref.shape[1:], 0) < size


def _load(ref: Any, index: Array, size: int) -> Array:
    """Returns a step of a reference ``[T, .., R]`` whose array has ``size`` rows, padded with zeros."""
    from jax.experimental.pallas import triton as pltriton

    # The interpreter needs indices of one dtype, and int is that of a slice's.
    return pltriton.load(ref.at[index.astype(int)], mask=_are_within(ref, size), other=0.0)


def _gpu_forward(num_places: Any, *refs: Any, options: KernelOptions, sizes: tuple[int, int]) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as pltriton

    (features, *leaves, carry, outputs), hiddens = refs[:11], refs[11:]
    weights, trained = _loaded(options, leaves, len(carry)), pl.program_id(0) < options.num_trained

    def store(index: Array, value: Array) -> None:
        pltriton.store(outputs.at[index.astype(int)], value, mask=_are_within(outputs, sizes[1]))

    def take(index: Array, hidden: Array) -> Array:
        hidden = _step(weights, hidden, _load(features, index, sizes[0])).hidden
        store(index, _dot(weights.head[0], hidden) + weights.head_bias[0])
        for ref in hiddens:
            pl.when(trained)(functools.partial(ref.__setitem__, index, hidden))
        return hidden

    def leave(index: Array, bias: Array) -> Array:
        store(index, bias)
        return bias

    jax.lax.fori_loop(0, num_places[0], take, carry[...])
    bias = jnp.broadcast_to(weights.head_bias[0], outputs.shape[1:])
    jax.lax.fori_loop(num_places[0], len(features), leave, bias)


def _gpu_backward(num_places: Any, *refs: Any, options: KernelOptions, sizes: tuple[int, int]) -> None:
    (features, *leaves, carry, hiddens, d_outputs), sums = refs[:-7], refs[-7:]
    weights, last = _loaded(options, leaves, len(carry)), num_places[0] - 1

    def take(count: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
        index = last - count
        before = jnp.where(index > 0, hiddens[jnp.maximum(index - 1, 0)], carry[...])
        inputs, d_output = _load(features, index, sizes[0]), _load(d_outputs, index, sizes[1])
        d_before, terms = _step_back(options, weights, before, inputs, state[0], d_output)
        return d_before, jax.tree.map(jnp.add, state[1], terms)

    counts = zip((*sums[:2], *sums[3:]), (4, 1, 1, 3, 3, 1), strict=True)
    zeros = [[jnp.zeros((len(ref) // count, ref.shape[1]), ref.dtype) for _ in range(count)] for ref, count in counts]
    d_carry, totals = jax.lax.fori_loop(0, num_places[0], take, (jnp.zeros_like(carry), zeros))
    for ref, parts in zip(sums, (*totals[:2], [d_carry], *totals[2:]), strict=True):
        for number, part in enumerate(parts):
            ref[number * len(part) : (number + 1) * len(part), :] = part


def forward_call(
    options: KernelOptions,
    weights: KernelWeights,
    carry: Array,
    features: Array,
    num_places: Array,
    actions: int,
    *,
    store: bool,
) -> list[Array]:
    """Returns the utilities ``[G, T, A, R]`` and, if ``store``, the trained nets' hidden states ``[.., T, H, R]``.

    The hidden states of steps that aren't taken hold anything.
    """
    (nets, height, rows), length = carry.shape, len(features)
    outputs = [("net_steps", (nets, length, actions, rows)), ("stored", (options.num_trained, length, height, rows))]
    inputs = [("steps", features), *(("net", leaf) for leaf in weights), ("rows", carry)]
    tpu = options.platform == "tpu"
    kernel = _tpu_forward if tpu else functools.partial(_gpu_forward, sizes=(features.shape[1], actions))
    scratch = (height, options.rows) if tpu else None
    return _call(kernel, options, num_places, inputs, outputs[: 1 + store], scratch)


def backward_call(
    options: KernelOptions,
    weights: KernelWeights,
    carry: Array,
    features: Array,
    num_places: Array,
    hiddens: Array,
    d_outputs: Array,
) -> list[Array]:
    """Returns sums over time for the trained nets.

    Those of the gradients with respect to the gates, the new gate's two terms apart, ``[G, 4H, R]`` and to the
    encoder's output ``[G, F, R]``; the gradient with respect to ``carry``; the gradients of the four kernels as each
    block of rows adds to them, ``[G, blocks, out, in]``.
    """
    nets, (_, height, rows), kernels = options.num_trained, carry.shape, weights[::2]
    sizes = 4 * height, weights.encoder.shape[1], height
    outputs = [
        *(("rows", (nets, size, rows)) for size in sizes),
        *(("sums", (nets, rows // options.rows, *leaf.shape[1:])) for leaf in kernels),
    ]
    previous = [("previous", hiddens)] if options.platform == "tpu" else []
    inputs = [("steps", features), *(("net", leaf) for leaf in weights), ("rows", carry), *previous]
    inputs += [("net_steps_read", hiddens), ("net_steps_read", d_outputs)]
    sizes = features.shape[1], d_outputs.shape[2]
    kernel = _tpu_backward if options.platform == "tpu" else functools.partial(_gpu_backward, sizes=sizes)
    return _call(kernel, options, num_places, inputs, outputs, reverse=True)


def _call(
    kernel: Callable[..., None],
    options: KernelOptions,
    num_places: Array,
    inputs: list[tuple[str, Array]],
    outputs: list[tuple[str, tuple[int, ...]]],
    scratch: tuple[int, ...] | None = None,
    *,
    reverse: bool = False,
) -> list[Array]:
    """Runs a kernel on a grid of nets, blocks of rows and blocks of time; `_block_spec` lists the names of blocks."""
    from jax.experimental import pallas as pl

    features, on_tpu = inputs[0][1], options.platform == "tpu"
    options = options if on_tpu else options._replace(steps=len(features))
    times = pl.cdiv(len(features), options.steps)
    spec = functools.partial(_block_spec, options=options, times=times, reverse=reverse)
    grid: dict[str, Any] = {
        "grid": (outputs[0][1][0], features.shape[2] // options.rows, times),
        "in_specs": [spec(name, array.shape) for name, array in inputs],
        "out_specs": [spec(name, shape) for name, shape in outputs],
    }
    if on_tpu:
        from jax.experimental.pallas import tpu as pltpu

        # The index maps see the number of steps: nothing is loaded for blocks of time that have none. All axes are
        # sequential, as `_block_spec` needs.
        grid["scratch_shapes"] = [pltpu.VMEM(scratch, features.dtype)] if scratch else []
        grid = {"grid_spec": pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, **grid)}
        params: Any = pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3)
    else:
        from jax.experimental.pallas import triton as pltriton

        grid["in_specs"].insert(0, pl.BlockSpec((1,), lambda *_: (0,)))
        params = pltriton.CompilerParams(num_warps=options.warps, num_stages=1)
    return pl.pallas_call(
        functools.partial(kernel, options=options),
        out_shape=[jax.ShapeDtypeStruct(shape, features.dtype) for _, shape in outputs],
        compiler_params=params,
        interpret=options.interpret,
        name="persistent_backward" if reverse else "persistent_forward",
        **grid,
    )(num_places.reshape(1), *(array for _, array in inputs))


def _block_spec(name: str, shape: tuple[int, ...], *, options: KernelOptions, times: int, reverse: bool) -> Any:
    """Returns the block of an array that the program ``net, row, time`` of the grid sees, without leading axes."""
    from jax.experimental import pallas as pl

    steps, rows = options.steps, options.rows

    def block(time: Any, places: tuple[Any, ...]) -> Any:
        """Returns the block of time, or the last one that has steps; ``places`` is empty on a GPU."""
        time = times - 1 - time if reverse else time
        return jnp.minimum(time, jax.lax.div(places[0][0] - 1, np.int32(steps))) if places else time

    def previous(time: Any, places: tuple[Any, ...]) -> Any:
        return jnp.maximum(block(time, places) * steps - 1, 0)

    def stored(net: Any, row: Any, time: Any, *_: Any) -> tuple[Any, ...]:
        """Returns the last block that was written, for nets whose hidden states are not."""
        last = shape[0] - 1, times - 1, shape[-1] // rows - 1
        here = zip((net, time, row), last, strict=True)
        net_index, time_index, row_index = (jnp.where(net < shape[0], one, np.int32(other)) for one, other in here)
        return net_index, time_index, 0, row_index

    size = shape[-2]
    padded = size + padding(options, size)
    blocks: dict[str, tuple[Any, Callable[..., Any]]] = {
        "steps": ((steps, padded, rows), lambda net, row, time, *n: (block(time, n), 0, row)),
        "net": ((None, size, shape[-1]), lambda net, *_: (net, 0, 0)),
        "rows": ((None, size, rows), lambda net, row, *_: (net, 0, row)),
        "net_steps": ((None, steps, padded, rows), lambda net, row, time, *_: (net, time, 0, row)),
        "net_steps_read": ((None, steps, padded, rows), lambda net, row, time, *n: (net, block(time, n), 0, row)),
        "previous": ((None, 1, size, rows), lambda net, row, time, *n: (net, previous(time, n), 0, row)),
        "stored": ((None, steps, size, rows), stored),
        "sums": ((None, None, size, shape[-1]), lambda net, row, *_: (net, row, 0, 0)),
    }
    return pl.BlockSpec(*blocks[name])
