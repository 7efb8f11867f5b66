"""The forms of the agents' networks: which inputs, with or without memory, one set of weights or several."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.agent import AgentForm, SeenByAgents, Unrolled, agent_inputs, unroll_agents
from wqmix_jax.networks.functional import BlockForm, compute_in, unroll_in_blocks

STEPS, ROWS, AGENTS, OBS, ACTIONS, HIDDEN = 7, 4, 3, 2, 5, 6
FORM = AgentForm(HIDDEN, ACTIONS)
BLOCKS = BlockForm(max_steps=3, steps_inline=1)
ALONE, PAIRED = (0, 1, 2), (1, 0, 1)

FORMS = {
    "shared": FORM,
    "alone": FORM._replace(groups=ALONE),
    "paired": FORM._replace(groups=PAIRED),
    "normalised": FORM._replace(layer_norm=True),
    "feedforward": FORM._replace(recurrent=False),
    "without inputs": FORM._replace(has_id=False, has_last_action=False),
    "all": AgentForm(HIDDEN, ACTIONS, False, False, True, True, 1.0, PAIRED),
    "all feedforward": AgentForm(HIDDEN, ACTIONS, False, True, False, True, 0.01, ALONE),
}


@pytest.fixture(autouse=True)
def x64() -> Any:
    with jax.enable_x64(True):
        yield


def drawn(form: AgentForm, seed: int = 0) -> Any:
    """Parameters in double precision, none of which is zero or one."""
    rng = np.random.default_rng(seed)
    params = jax.eval_shape(lambda: form.init(jax.random.key(seed), AGENTS, OBS))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2), params)


def sequence(*, has_starts: bool = False) -> SeenByAgents:
    rng = np.random.default_rng(1)
    batch = (STEPS, ROWS, AGENTS)
    starts = jnp.broadcast_to(jnp.asarray(rng.random(batch[:2]) < 0.3)[..., None], batch) if has_starts else None
    return SeenByAgents(
        jnp.asarray(rng.normal(size=(*batch, OBS))), jnp.asarray(rng.integers(-1, ACTIONS, batch)), starts
    )


def zeros() -> jax.Array:
    return jnp.zeros((ROWS, AGENTS, HIDDEN))


@functools.partial(jax.jit, static_argnums=(0, 3))
def unrolled(form: AgentForm, params: Any, seen: SeenByAgents, blocks: BlockForm | None = None) -> Unrolled:
    with unroll_in_blocks(blocks):
        return unroll_agents(form, [params], [], zeros(), seen, keeps_hiddens=True)[0]


def equal(one: Any, other: Any, tolerance: float = 1e-12) -> None:
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_gradients(form: AgentForm, nets: list[Any], seen: SeenByAgents, blocks: BlockForm | None) -> Any:
    """The results of a trained and a frozen net, and the gradient of the first and of the observations."""

    def loss(params: Any, obs: jax.Array) -> Any:
        with unroll_in_blocks(blocks):
            every = unroll_agents(form, [params], nets[1:], zeros(), seen._replace(obs=obs), keeps_hiddens=True)
        taken = STEPS if seen.num_places is None else seen.num_places
        is_place = (jnp.arange(STEPS) < taken)[:, None, None, None]
        every = jax.tree.map(lambda leaf: jnp.where(is_place, leaf, 0), every)
        trained, frozen = every[0], jax.lax.stop_gradient(every[1])
        return (jnp.sin(trained.utilities) + frozen.utilities).sum() + (trained.hiddens**2).sum(), every

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(nets[0], seen.obs)


@pytest.mark.parametrize("name", FORMS)
def test_both_learner_forms_agree(name: str) -> None:
    """In rows of several episodes, of which the first places are filled."""
    form = FORMS[name]
    nets, seen = [drawn(form), drawn(form, 1)], sequence(has_starts=True)._replace(num_places=jnp.int32(5))
    by_step, in_blocks = (value_and_gradients(form, nets, seen, blocks) for blocks in (None, BLOCKS))
    equal(by_step, in_blocks)
    assert all(leaf.any() for leaf in jax.tree.leaves(by_step[1]))


@pytest.mark.parametrize("name", ["paired", "normalised", "feedforward", "all"])
def test_steps_are_the_unrolled_sequence(name: str) -> None:
    """As agents act: one observation after the other."""
    form, seen = FORMS[name], sequence()
    params, carry, utilities, step = drawn(form), zeros(), [], jax.jit(form.step)
    for place in range(STEPS):
        carry, values = step(params, carry, seen.obs[place], seen.last_action[place])
        utilities.append(values)
    equal(jnp.stack(utilities), unrolled(form, params, seen).utilities)


@pytest.mark.parametrize(
    ("blocks", "groups", "options"),
    [
        (None, ALONE, {}),
        (BLOCKS, PAIRED, {}),
        (BLOCKS, (0, 0, 0), {}),
        (None, PAIRED, {"recurrent": False}),
        (BLOCKS, ALONE, {"layer_norm": True}),
    ],
)
def test_groups_are_separate_networks(blocks: Any, groups: tuple[int, ...], options: dict[str, Any]) -> None:
    """Each agent's values are those of its group's network alone, and a group's gradient is the sum of its agents'."""
    form, shared, seen = FORM._replace(groups=groups, **options), FORM._replace(**options), sequence(has_starts=True)
    params = drawn(form)
    [(name, stacked)] = params.items()
    assert name == ("agents" if groups == ALONE else "groups")

    def loss(found: Unrolled) -> jax.Array:
        return (jnp.sin(found.utilities) * jnp.arange(1, AGENTS + 1)[None, None, :, None]).sum()

    def one_by_one(separate: list[Any]) -> tuple[jax.Array, Unrolled]:
        every = [unrolled(shared, separate[group], seen) for group in groups]
        own = [jax.tree.map(lambda leaf, agent=agent: leaf[:, :, agent], every[agent]) for agent in range(AGENTS)]
        found = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=2), *own)
        return loss(found), found

    def together(params: Any) -> tuple[jax.Array, Unrolled]:
        found = unrolled(form, params, seen, blocks)
        return loss(found), found

    separate = [jax.tree.map(lambda leaf, group=group: leaf[group], stacked) for group in range(max(groups) + 1)]
    expected, known = jax.jit(jax.grad(one_by_one, has_aux=True))(separate)
    found, values = jax.jit(jax.grad(together, has_aux=True))(params)
    equal(values, known)
    equal(found[name], jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


def test_each_group_is_drawn_from_its_key() -> None:
    key = jax.random.key(3)
    [stacked] = FORM._replace(groups=PAIRED).init(key, AGENTS, OBS).values()
    for group, own in enumerate(jax.random.split(key, 2)):
        equal(jax.tree.map(lambda leaf, group=group: leaf[group], stacked), FORM.init(own, AGENTS, OBS), 1e-7)


@pytest.mark.parametrize(("has_last_action", "has_id"), [(True, True), (True, False), (False, True), (False, False)])
def test_inputs_are_the_parts_that_are_chosen(has_last_action: bool, has_id: bool) -> None:
    obs, last_action = jnp.arange(6.0).reshape(3, 2), jnp.array([-1, 0, 4])
    found = agent_inputs(obs, last_action, ACTIONS, has_last_action=has_last_action, has_id=has_id)
    actions = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    parts = [np.asarray(obs)] + [np.array(actions)] * has_last_action + [np.eye(3)] * has_id
    np.testing.assert_array_equal(found, np.concatenate(parts, axis=-1))


def test_agents_without_ids_are_interchangeable() -> None:
    """Equal observations give equal values; with ids they don't."""
    seen = sequence()
    alike = seen._replace(
        obs=jnp.broadcast_to(seen.obs[:, :, :1], seen.obs.shape),
        last_action=jnp.broadcast_to(seen.last_action[:, :, :1], seen.last_action.shape),
    )
    for has_id in (False, True):
        form = FORM._replace(has_id=has_id)
        values = unrolled(form, drawn(form), alike).utilities
        assert bool(jnp.allclose(values, values[:, :, :1])) != has_id


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_feed_forward_agent_forgets(recurrent: bool) -> None:
    """An earlier step reaches the later ones through the GRU alone."""
    form, seen = FORM._replace(recurrent=recurrent), sequence()
    params, other = drawn(form), seen._replace(obs=seen.obs.at[0].add(1.0))
    one, two = (unrolled(form, params, each).utilities for each in (seen, other))
    assert (one[0] != two[0]).all()
    assert bool((one[1:] == two[1:]).all()) != recurrent


def test_a_feed_forward_agent_is_two_hidden_layers() -> None:
    form, seen = FORM._replace(recurrent=False), sequence()
    params, hidden = jax.tree.map(np.asarray, (drawn(form), agent_inputs(*sequence()[:2], ACTIONS)))
    for layer in ("encoder", "hidden"):
        hidden = np.maximum(hidden @ params[layer]["kernel"] + params[layer]["bias"], 0)
    found = unrolled(form, params, seen)
    equal(found.hiddens, hidden)
    equal(found.utilities, hidden @ params["head"]["kernel"] + params["head"]["bias"])


def normalised(values: Any, params: Any) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-5) over features, scaled and shifted, as torch's LayerNorm."""
    values = np.asarray(values)
    mean, variance = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
    return (values - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def test_layers_are_normalised_before_the_relu_and_before_the_head() -> None:
    form, seen = FORM._replace(layer_norm=True), sequence()
    params, inputs = jax.tree.map(np.asarray, (drawn(form), agent_inputs(*sequence()[:2], ACTIONS)))
    encoded = normalised(inputs @ params["encoder"]["kernel"] + params["encoder"]["bias"], params["encoder_norm"])
    found = unrolled(form, params, seen)
    # A network without normalisation whose encoder hands on what was encoded here: relu(x I + 0) is x for x >= 0.
    plain = {"gru": params["gru"], "head": params["head"]}
    plain["encoder"] = {"kernel": jnp.eye(HIDDEN), "bias": jnp.zeros(HIDDEN)}
    bare = FORM._replace(has_id=False, has_last_action=False)
    known = unrolled(bare, plain, seen._replace(obs=jnp.maximum(jnp.asarray(encoded), 0)))
    equal(found.hiddens, known.hiddens)
    head = normalised(found.hiddens, params["head_norm"]) @ params["head"]["kernel"] + params["head"]["bias"]
    equal(found.utilities, head)


def test_a_feed_forward_agent_is_normalised_before_both_relus() -> None:
    form, seen = FORM._replace(layer_norm=True, recurrent=False), sequence()
    params, hidden = jax.tree.map(np.asarray, (drawn(form), agent_inputs(*sequence()[:2], ACTIONS)))
    for layer in ("encoder", "hidden"):
        hidden = hidden @ params[layer]["kernel"] + params[layer]["bias"]
        hidden = np.maximum(normalised(hidden, params[f"{layer}_norm"]), 0)
    equal(unrolled(form, params, seen).hiddens, hidden)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("groups", [None, ALONE])
def test_orthogonal_kernels_have_their_gains_and_biases_are_zero(recurrent: bool, groups: Any) -> None:
    form = AgentForm(HIDDEN, ACTIONS, recurrent=recurrent, head_gain=0.01, groups=groups)
    params = form.init(jax.random.key(0), AGENTS, OBS)
    sets = [params]
    if groups is not None:
        sets = [jax.tree.map(lambda leaf, group=group: leaf[group], params["agents"]) for group in range(AGENTS)]
        assert not np.allclose(sets[0]["encoder"]["kernel"], sets[1]["encoder"]["kernel"])
    for layers in sets:
        kernels = [(layers["encoder"]["kernel"], 2**0.5), (layers["head"]["kernel"], 0.01)]
        if recurrent:
            gru = layers["gru"]
            gates = [jnp.split(gru[name], 3, axis=1) for name in ("input_kernel", "hidden_kernel")]
            kernels += [(gate, 1.0) for gate in itertools.chain(*gates)]
            assert not np.allclose(kernels[-1][0], kernels[-2][0])
        else:
            kernels.append((layers["hidden"]["kernel"], 2**0.5))
        for kernel, gain in kernels:
            product = kernel.T @ kernel if len(kernel) >= kernel.shape[1] else kernel @ kernel.T
            np.testing.assert_allclose(product, gain**2 * np.eye(len(product)), atol=1e-5)
        biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layers) if "bias" in str(path[-1])]
        assert len(biases) == (4 if recurrent else 3)
        assert not any(leaf.any() for leaf in biases)


@pytest.mark.parametrize("blocks", [None, BLOCKS])
@pytest.mark.parametrize("name", ["paired", "all", "all feedforward"])
def test_every_product_has_operands_in_bfloat16(name: str, blocks: Any) -> None:
    """Those of stacked weights, whose biases are matrices, too; biases are added in float32."""
    form = FORMS[name]
    params, seen = jax.tree.map(jnp.float32, (drawn(form), sequence()._replace(last_action=None)))
    seen = seen._replace(last_action=sequence().last_action)
    carry = jnp.float32(zeros())
    with compute_in("bfloat16"), unroll_in_blocks(blocks):
        program = jax.make_jaxpr(lambda params: unroll_agents(form, [params], [], carry, seen))(params)
        found = jax.eval_shape(lambda params: unroll_agents(form, [params], [], carry, seen), params)[0].utilities
    products = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert {var.aval.dtype for eqn in products for var in eqn.invars} == {jnp.dtype("bfloat16")}
    assert found.dtype == jnp.float32


def equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", ["shared", "alone", "paired"])
def test_a_recurrent_unroll_has_one_loop_whatever_the_number_of_agents(name: str) -> None:
    form, seen = FORMS[name], sequence()
    program = jax.make_jaxpr(lambda params: unroll_agents(form, [params], [], zeros(), seen))(drawn(form))
    assert sum(eqn.primitive.name == "scan" for eqn in equations(program.jaxpr)) == 1


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_a_feed_forward_unroll_has_no_loop(blocks: Any) -> None:
    form, seen = FORM._replace(recurrent=False, groups=PAIRED), sequence()
    with unroll_in_blocks(blocks):
        program = jax.make_jaxpr(lambda params: unroll_agents(form, [params], [], zeros(), seen))(drawn(form))
    assert not {"scan", "while"} & {eqn.primitive.name for eqn in equations(program.jaxpr)}
