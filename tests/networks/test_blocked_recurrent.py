"""The form of the recurrent part for accelerators against the one for a CPU: equal values and gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.agent import RecurrentAgent, SeenByAgents, agent_inputs, unroll_agents
from wqmix_jax.networks.functional import BlockForm, compute_in, init_net, unroll_in_blocks

ROWS, AGENTS, OBS, ACTIONS, HIDDEN, BLOCK = 3, 2, 4, 5, 6, 4
AGENT = RecurrentAgent(HIDDEN, ACTIONS)
TRAINED, NETS = 2, 3


class Data(NamedTuple):
    """Two trained networks and a frozen one, a sequence, and weights of the loss ``[G, T, B, N, A or H]``."""

    nets: list
    carry: jax.Array
    obs: jax.Array
    last_action: jax.Array
    starts: jax.Array
    utility_weights: jax.Array
    hidden_weights: jax.Array


def data_of(num_steps, dtype):
    rng = np.random.default_rng(num_steps)
    batch = (num_steps, ROWS, AGENTS)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    obs, last_action = normal(*batch, OBS), jnp.asarray(rng.integers(-1, ACTIONS, batch))
    inputs, carry = agent_inputs(obs, last_action, ACTIONS), normal(ROWS, AGENTS, HIDDEN)
    like = jax.eval_shape(lambda: init_net(AGENT, jax.random.key(0), carry, inputs))
    nets = [jax.tree.map(lambda leaf: normal(*leaf.shape), like) for _ in range(NETS)]
    starts = jnp.asarray(rng.random(batch) < 0.3)
    return Data(nets, carry, obs, last_action, starts, normal(NETS, *batch, ACTIONS), normal(NETS, *batch, HIDDEN))


def value_and_gradients(form, data, num_places=None, *, has_starts=True, keeps_hiddens=True):
    """Returns the results at the places that are taken, and the gradients of nets, carry and observations."""

    def loss(nets, carry, obs):
        starts = data.starts if has_starts else None
        seen = SeenByAgents(obs, data.last_action, starts, num_places=num_places)
        with unroll_in_blocks(form):
            every = unroll_agents(AGENT, nets[:TRAINED], nets[TRAINED:], carry, seen, keeps_hiddens=keeps_hiddens)
        assert all((net.hiddens is not None) == keeps_hiddens for net in every)
        is_place = jnp.arange(len(obs)) < (len(obs) if num_places is None else num_places)
        every = jax.tree.map(lambda leaf: jnp.where(is_place[:, None, None, None], leaf, 0), every)
        # In blocks, frozen networks have no gradient although the loss depends on them.
        seen = every if form else [*every[:TRAINED], *jax.lax.stop_gradient(every[TRAINED:])]
        value = sum((jnp.sin(net.utilities) * data.utility_weights[index]).sum() for index, net in enumerate(seen))
        if keeps_hiddens:
            value += sum((net.hiddens**2 * data.hidden_weights[index]).sum() for index, net in enumerate(seen))
        return value, every

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(data.nets, data.carry, data.obs)


@pytest.mark.parametrize(
    ("num_steps", "form", "has_starts", "is_bounded", "keeps_hiddens"),
    [
        (11, BlockForm(BLOCK, 1), True, True, True),
        (12, BlockForm(BLOCK, 1, recomputes=True), False, False, False),
        (11, BlockForm(BLOCK, 2), False, True, False),
        (12, BlockForm(BLOCK, 2, recomputes=True), True, False, True),
        (11, BlockForm(BLOCK, 32, recomputes=True), True, False, False),
        (12, BlockForm(BLOCK, 32), False, True, True),
        (1, BlockForm(BLOCK, 1), True, True, False),
    ],
)
def test_the_two_forms_agree(num_steps, form, has_starts, is_bounded, keeps_hiddens):
    """Blocks after the last place aren't computed: what is not a number there reaches neither values nor gradients."""
    options = {"has_starts": has_starts, "keeps_hiddens": keeps_hiddens}
    with jax.enable_x64(True):
        data = data_of(num_steps, "float64")
        by_step, in_blocks = (
            jax.jit(lambda data, num_places, form=form: value_and_gradients(form, data, num_places, **options))
            for form in (None, form)
        )
        for num_places in sorted({1, min(5, num_steps), min(8, num_steps), num_steps}) if is_bounded else [None]:
            if num_places:
                unused = -(-num_places // BLOCK) * BLOCK
                data = data._replace(obs=data_of(num_steps, "float64").obs.at[unused:].set(jnp.nan))
            expected, found = by_step(data, num_places), in_blocks(data, num_places)
            for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10, equal_nan=False)
            nets, *_ = found[1]
            assert not any(leaf.any() for leaf in jax.tree.leaves(nets[TRAINED:]))
            assert all(leaf.any() for leaf in jax.tree.leaves(nets[:TRAINED]))


def test_the_two_forms_agree_in_bfloat16():
    """And every product of the blocks has operands in bfloat16."""
    data, blocks = data_of(11, "float32"), BlockForm(BLOCK, 1)
    with compute_in("bfloat16"):
        by_step, in_blocks = (jax.jit(lambda data, i=i: value_and_gradients(i, data))(data) for i in (None, blocks))
        operands = [
            var.aval.dtype
            for eqn in equations(jax.make_jaxpr(lambda data: value_and_gradients(blocks, data))(data).jaxpr)
            if eqn.primitive.name == "dot_general"
            for var in eqn.invars
        ]
    for one, other in zip(*map(jax.tree.leaves, (in_blocks, by_step)), strict=True):
        scale = max(1e-6, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2 * scale)
    assert set(operands) == {jnp.dtype("bfloat16")}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 1), (2, 2), (32, 32), (33, 17), (61, 31), (201, 29)])
def test_blocks_are_as_few_as_possible_and_evenly_long(num_steps, expected):
    assert BlockForm(max_steps=32, steps_inline=1).block_length(num_steps) == expected
