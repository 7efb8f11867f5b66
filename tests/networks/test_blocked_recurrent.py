"""The form of the recurrent part for accelerators against the one for a CPU: equal values and gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.agent import AgentForm, SeenByAgents, unroll_agents
from wqmix_jax.networks.functional import BlockForm, compute_in, unroll_in_blocks

ROWS, AGENTS, OBS, ACTIONS, HIDDEN, BLOCK = 3, 2, 4, 5, 6, 4
AGENT = AgentForm(HIDDEN, ACTIONS)
TRAINED, NETS = 2, 3


class Data(NamedTuple):
    """Two trained networks and a frozen one, a sequence, and weights of the loss ``[G, T, B, N, A or H]``.

    Observations are ``base`` ``[T, B, N, O]`` times ``codes`` ``[T, B, 1, 1]``, int8.
    """

    nets: list
    carry: jax.Array
    base: jax.Array
    codes: jax.Array
    last_action: jax.Array
    starts: jax.Array
    utility_weights: jax.Array
    hidden_weights: jax.Array


def data_of(num_steps, dtype):
    rng = np.random.default_rng(num_steps)
    batch = (num_steps, ROWS, AGENTS)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    base, codes = normal(*batch, OBS), jnp.asarray(rng.integers(1, 4, (num_steps, ROWS, 1, 1)), jnp.int8)
    last_action, carry = jnp.asarray(rng.integers(-1, ACTIONS, batch)), normal(ROWS, AGENTS, HIDDEN)
    like = jax.eval_shape(lambda: AGENT.init(jax.random.key(0), AGENTS, OBS))
    nets = [jax.tree.map(lambda leaf: normal(*leaf.shape), like) for _ in range(NETS)]
    starts, weights = jnp.asarray(rng.random(batch) < 0.3), [normal(NETS, *batch, size) for size in (ACTIONS, HIDDEN)]
    return Data(nets, carry, base, codes, last_action, starts, *weights)


def observe(base, codes):
    return base * codes


def value_and_gradients(form, data, num_places=None, *, has_starts=True, keeps_hiddens=True, is_compact=False):
    """Returns the results at the places that are taken, and the gradients of nets, carry and ``base``."""

    def loss(nets, carry, base):
        obs = observe(base, data.codes)
        seen = SeenByAgents(obs, data.last_action, data.starts if has_starts else None, num_places=num_places)
        if is_compact and form:  # then the observations themselves aren't read
            seen = seen._replace(obs=obs * jnp.nan, compact=jax.tree_util.Partial(observe, base, data.codes))
        with unroll_in_blocks(form):
            every = unroll_agents(AGENT, nets[:TRAINED], nets[TRAINED:], carry, seen, keeps_hiddens=keeps_hiddens)
        assert all((net.hiddens is not None) == keeps_hiddens for net in every)
        is_place = jnp.arange(len(obs)) < (len(obs) if num_places is None else num_places)
        every = jax.tree.map(lambda leaf: jnp.where(is_place[:, None, None, None], leaf, 0), every)
        # In blocks, frozen networks have no gradient although the loss depends on them.
        used = every if form else [*every[:TRAINED], *jax.lax.stop_gradient(every[TRAINED:])]
        value = sum((jnp.sin(net.utilities) * data.utility_weights[index]).sum() for index, net in enumerate(used))
        if keeps_hiddens:
            value += sum((net.hiddens**2 * data.hidden_weights[index]).sum() for index, net in enumerate(used))
        return value, every

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(data.nets, data.carry, data.base)


@pytest.mark.parametrize(
    ("num_steps", "form", "has_starts", "is_bounded", "keeps_hiddens", "is_compact"),
    [
        (11, BlockForm(BLOCK, 1), True, True, True, False),
        (12, BlockForm(BLOCK, 1, recomputes=True), False, False, False, True),
        (11, BlockForm(BLOCK, 2), False, True, False, True),
        (12, BlockForm(BLOCK, 2, recomputes=True), True, False, True, False),
        (11, BlockForm(BLOCK, 32), True, False, False, True),
        (12, BlockForm(BLOCK, 32), False, True, True, True),
        (1, BlockForm(BLOCK, 1, recomputes=True), True, True, False, False),
    ],
)
def test_the_two_forms_agree(num_steps, form, has_starts, is_bounded, keeps_hiddens, is_compact):
    """Blocks after the last place aren't computed: what is not a number there reaches neither values nor gradients."""
    options = {"has_starts": has_starts, "keeps_hiddens": keeps_hiddens, "is_compact": is_compact}
    with jax.enable_x64(True):
        data = data_of(num_steps, "float64")
        by_step, in_blocks = (
            jax.jit(lambda data, num_places, form=form: value_and_gradients(form, data, num_places, **options))
            for form in (None, form)
        )
        for num_places in sorted({1, min(5, num_steps), min(8, num_steps), num_steps}) if is_bounded else [None]:
            unused = num_steps if num_places is None else -(-num_places // BLOCK) * BLOCK
            seen = data._replace(base=data.base.at[unused:].set(jnp.nan))
            expected, found = by_step(seen, num_places), in_blocks(seen, num_places)
            for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10, equal_nan=False)
            nets, *_ = found[1]
            assert not any(leaf.any() for leaf in jax.tree.leaves(nets[TRAINED:]))
            assert all(leaf.any() for leaf in jax.tree.leaves(nets[:TRAINED]))


def test_the_two_forms_agree_in_bfloat16():
    """And every product of the blocks has operands in bfloat16."""
    data, form = data_of(11, "float32"), BlockForm(BLOCK, 1, recomputes=True)
    with compute_in("bfloat16"):
        by_step, in_blocks = (jax.jit(lambda data, f=f: value_and_gradients(f, data))(data) for f in (None, form))
        program = jax.make_jaxpr(lambda data: value_and_gradients(form, data))(data).jaxpr
    for one, other in zip(*map(jax.tree.leaves, (in_blocks, by_step)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2 * float(jnp.abs(other).max()))
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    assert {var.aval.dtype for eqn in products for var in eqn.invars} == {jnp.dtype("bfloat16")}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 1), (2, 2), (32, 32), (33, 17), (61, 31), (201, 29)])
def test_blocks_are_as_few_as_possible_and_evenly_long(num_steps, expected):
    assert BlockForm(32, 1).block_length(num_steps) == expected
