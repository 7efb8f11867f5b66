import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import AGENT, QMIX, TD, TINY, Clock, tiny_dcg, tiny_powqmix, tiny_resq, tiny_wqmix
from wqmix_jax.algos.actor_critic import ActorCritic
from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.algos.dcg import DCG
from wqmix_jax.algos.iql import IQL
from wqmix_jax.algos.masac import MASAC
from wqmix_jax.algos.q_learning import gather_actions, seen_after
from wqmix_jax.algos.qtran import QTRAN
from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.errors import ConfigError
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.options import build
from wqmix_jax.training.learner import apply_gradients, clip_by_joint_norm, copy_targets, init_learner, joint_sum
from wqmix_jax.types import Episode

ENV = Clock(episode_limit=4, ends_from=4)
CTX = Context(jnp.float32(0), jnp.int32(0), jnp.int32(0))
KEY = jax.random.key(0)


def batch_of(lengths, terminated, seed=0):
    """Random episodes of the given lengths; every action is available where a step is real or last."""
    spec, keys = ENV.spec, jax.random.split(jax.random.key(seed), 4)
    limit, rows = spec.episode_limit, len(lengths)
    lengths, terminated = jnp.array(lengths)[:, None], jnp.array(terminated)[:, None]
    steps = jnp.arange(limit)[None, :]
    ends = terminated & (steps == lengths - 1)
    return Episode(
        obs=jax.random.normal(keys[0], (rows, limit + 1, spec.num_agents, spec.obs_dim)),
        state=jax.random.normal(keys[1], (rows, limit + 1, spec.state_dim)),
        avail_actions=jnp.ones((rows, limit + 1, spec.num_agents, spec.num_actions), bool),
        joint_action=jax.random.randint(keys[2], (rows, limit, spec.num_agents), 0, spec.num_actions),
        reward=jax.random.normal(keys[3], (rows, limit)),
        discount=1.0 - ends.astype(jnp.float32),
        mask=(steps < lengths).astype(jnp.float32),
    )


def every_algorithm():
    td = {"_target_": "wqmix_jax.algos.iql.IQL", **TD, "weighting": "uniform", "alpha": 1.0}
    qmix = {"_target_": "wqmix_jax.algos.qmix.QMIX", **QMIX}
    qplex = {"_target_": "wqmix_jax.algos.qplex.QPLEX", **TD, "hypernet_dim": 3, "attention_dim": 4, "num_heads": 2}
    qtran = {"_target_": "wqmix_jax.algos.qtran.QTRAN", **TD, "mixer_embed_dim": 4, "mixer_layers": 2}
    critic = AGENT | TINY | {"q_star_dim": 6}
    return {
        "iql": build("algo", td),
        "vdn": build("algo", qmix | {"mixer": "vdn"}),
        "qmix": build("algo", qmix),
        "qatten": build("algo", qmix | {"mixer": "qatten"}),
        "qplex": build("algo", qplex),
        "qtran": build("algo", qtran | {"lambda_opt": 1.0, "lambda_nopt": 10.0}),
        "dcg": tiny_dcg(),
        "cw_qmix": tiny_wqmix(),
        "ow_qmix": tiny_wqmix(weighting="optimistic"),
        "attention": tiny_wqmix(q_star="attention"),
        "qmix_cw": tiny_wqmix(q_star="none"),
        "resq": tiny_resq(),
        "powqmix": tiny_powqmix(),
        "maddpg": build("algo", {"_target_": "wqmix_jax.algos.maddpg.MADDPG", **critic, "gumbel_temperature": 1.0}),
        "masac": build("algo", {"_target_": "wqmix_jax.algos.masac.MASAC", **critic, "alpha_ent": 0.5}),
    }


def value_of(algo, params, batch, joint_action):
    """The estimate that targets bootstrap from, of a joint action after each step."""
    seen = seen_after(batch)
    if isinstance(algo, DCG):
        values = graph_values_of(algo, params, batch)
        return algo.q_value(params, jax.tree.map(lambda leaf: leaf[:, 1:], values), joint_action, seen.state)
    if isinstance(algo, QTRAN):
        [unrolled] = algo.unroll_nets(batch, [params["agent"]], keeps_hiddens=True)
        return algo.joint_value(params["mixer"], unrolled.hiddens[:, 1:], joint_action, seen).q
    if isinstance(algo, IQL):
        return gather_actions(algo.unroll(params["agent"], batch)[:, 1:], joint_action)
    if isinstance(algo, ActorCritic):
        critic_qs = algo.unroll(params["q_star_agent"], batch)[:, 1:]
        return algo.critic_values(params["q_star_mixer"], critic_qs, joint_action, seen.state)
    if isinstance(algo, WQMIX):
        net = "agent" if algo.q_star == "none" else "q_star_agent"
        return algo.central_estimate(params, algo.unroll(params[net], batch)[:, 1:], joint_action, seen)
    return algo.mix(params["mixer"], algo.unroll(params["agent"], batch)[:, 1:], joint_action, seen)[0]


def graph_values_of(algo, params, batch):
    """DCG's utilities and payoffs at all states."""
    [unrolled] = algo.unroll_nets(batch, [params["agent"]], keeps_hiddens=True)
    return algo.graph_values(params, unrolled)


def greedy_of(algo, params, batch):
    """The greedy joint actions at all states, ``[B, T+1, N]``."""
    if isinstance(algo, DCG):
        return algo.greedy(graph_values_of(algo, params, batch), batch.avail_actions)
    return greedy_actions(algo.unroll(params["agent"], batch), batch.avail_actions)


@pytest.fixture(params=every_algorithm().items(), ids=lambda item: item[0])
def algo(request):
    return request.param[1]


@functools.partial(jax.jit, static_argnums=0)
def loss_of(algo, params, target, batch):
    return algo.loss(params, target, batch, hyperparams(algo), CTX, algo.sample_noise(KEY, batch))


def params_and_target(algo):
    return algo.init(jax.random.key(1), ENV.spec), algo.init(jax.random.key(2), ENV.spec)


def test_the_target_bootstraps_past_a_time_limit_and_not_past_a_true_end(algo):
    """Same data twice: once the last step was the task's end, once only the limit's."""
    params, target = params_and_target(algo)
    y = {}
    for ended in (True, False):
        _, aux = loss_of(algo, params, target, batch_of([4, 3], [ended, ended]))
        y[ended] = np.array(aux.values["td_target"])
    batch = batch_of([4, 3], [True, True])
    for row, last in ((0, 3), (1, 2)):
        np.testing.assert_allclose(
            y[True][row, last], np.broadcast_to(batch.reward[row, last], y[True][row, last].shape)
        )
        assert (np.abs(y[False][row, last] - y[True][row, last]) > 1e-3).all()
        np.testing.assert_array_equal(y[True][row, :last], y[False][row, :last])


def test_padding_reaches_neither_loss_nor_gradient_and_the_last_real_step_does(algo):
    params, target = params_and_target(algo)
    grad = jax.jit(jax.value_and_grad(lambda p, b: loss_of(algo, p, target, b)[0]))
    batch, other = batch_of([2, 4], [True, False]), batch_of([2, 4], [True, False], seed=5)
    # Row 0 has steps 0 and 1; what is seen at 2 is its last observation, everything after it is padding.
    padded = Episode(
        *(mine.at[0, 3:].set(its[0, 3:]) for mine, its in zip(batch[:3], other[:3], strict=True)),
        *(mine.at[0, 2:].set(its[0, 2:]) for mine, its in zip(batch[3:6], other[3:6], strict=True)),
        mask=batch.mask,
    )
    for one, two in zip(jax.tree.leaves(grad(params, batch)), jax.tree.leaves(grad(params, padded)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
    last = batch._replace(reward=batch.reward.at[0, 1].add(1.0))
    assert not np.isclose(grad(params, batch)[0], grad(params, last)[0])


def test_an_unavailable_action_never_enters_the_maximum(algo):
    """With one action allowed to each agent, y is the target's value of just that action."""
    params, target = params_and_target(algo)
    batch = batch_of([4, 4], [False, False])
    allowed = jnp.array([2, 1])
    only = jnp.broadcast_to(jnp.arange(3)[None, :] == allowed[:, None], batch.avail_actions.shape)
    _, free = loss_of(algo, params, target, batch)
    _, bound = loss_of(algo, params, target, batch._replace(avail_actions=only))
    joint_action = jnp.broadcast_to(allowed, batch.joint_action.shape)
    following = value_of(algo, target, batch._replace(avail_actions=only), joint_action)
    axes = (...,) + (None,) * (following.ndim - 2)
    expected = batch.reward[axes] + algo.gamma * following
    np.testing.assert_allclose(bound.values["td_target"], expected, rtol=1e-5)
    assert not np.allclose(free.values["td_target"], expected)


def test_the_value_is_the_targets_and_the_choice_the_online_nets(algo):
    """Double Q-learning: other online utilities may change only which action the target net is asked about."""
    if isinstance(algo, MASAC):
        pytest.skip("its target policy chooses")
    params, target = params_and_target(algo)
    batch = batch_of([4], [False])
    raised = dict(params, agent=jax.tree.map(jnp.copy, params["agent"]))
    raised["agent"]["head"]["bias"] = params["agent"]["head"]["bias"] + 3.0  # the same argmax everywhere
    y, same = (loss_of(algo, p, target, batch)[1].values["td_target"] for p in (params, raised))
    np.testing.assert_allclose(y, same, rtol=1e-6)
    other = dict(params, agent=params["agent"] | {"head": jax.tree.map(jnp.negative, params["agent"]["head"])})
    assert not np.allclose(y, loss_of(algo, other, target, batch)[1].values["td_target"])


def test_weights_multiply_q_tots_loss_and_leave_q_stars_alone():
    algo = tiny_wqmix(weighting="optimistic", alpha=0.25)
    params, target = params_and_target(algo)
    batch = batch_of([4, 2], [True, False])
    loss, aux = loss_of(algo, params, target, batch)
    error, mask = np.array(aux.values["td_error"]), np.array(batch.mask)
    weights = np.where(error < 0, 1.0, 0.25)
    assert len(np.unique(weights[mask > 0])) == 2
    qmix = (weights * error**2 * mask).sum() / mask.sum()
    central = ((np.array(aux.values["q_star"]) - np.array(aux.values["td_target"])) ** 2 * mask).sum() / mask.sum()
    np.testing.assert_allclose(aux.metrics["qmix_loss"], qmix, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["q_star_loss"], central, rtol=1e-5)
    np.testing.assert_allclose(loss, qmix + central, rtol=1e-5)


def test_hysteretic_iql_learns_less_from_a_target_below_the_utility():
    hysteretic = dataclasses.replace(every_algorithm()["iql"], weighting="optimistic", alpha=0.25)
    params, target = params_and_target(hysteretic)
    batch = batch_of([4, 2], [True, False])
    loss, aux = loss_of(hysteretic, params, target, batch)
    error, mask = np.array(aux.values["td_error"]), np.array(batch.mask)[..., None]
    weights = np.where(error < 0, 1.0, 0.25)
    assert len(np.unique(weights[mask[..., 0] > 0])) == 2
    np.testing.assert_allclose(loss, (weights * error**2 * mask).sum() / (2 * mask.sum()), rtol=1e-5)
    plain, _ = loss_of(every_algorithm()["iql"], params, target, batch)
    np.testing.assert_allclose(plain, (error**2 * mask).sum() / (2 * mask.sum()), rtol=1e-5)


def test_qtrans_losses_from_its_values():
    """Q* learns y; Q_tot, the sum plus V, is pulled to Q* at the greedy joint action, and only up at the taken one."""
    algo = every_algorithm()["qtran"]
    params, target = params_and_target(algo)
    batch = batch_of([4, 2], [True, False])
    loss, aux = loss_of(algo, params, target, batch)
    values, mask = {name: np.array(value) for name, value in aux.values.items()}, np.array(batch.mask)
    q_tot, greedy_q_tot = (values[name].sum(-1) + values["v"] for name in ("chosen_qs", "greedy_qs"))
    assert len(np.unique((q_tot < values["q_star"])[mask > 0])) == 2
    td = ((values["q_star"] - values["td_target"]) ** 2 * mask).sum() / mask.sum()
    opt = ((greedy_q_tot - values["greedy_q_star"]) ** 2 * mask).sum() / mask.sum()
    nopt = (np.minimum(q_tot - values["q_star"], 0) ** 2 * mask).sum() / mask.sum()
    np.testing.assert_allclose(loss, td + opt + 10 * nopt, rtol=1e-5)
    is_greedy = (np.array(batch.joint_action) == values["greedy_actions"][:, :-1]).all(-1)
    weights = np.where(is_greedy, 1.0, np.where(q_tot < values["q_star"], 10.0, 0.0))
    np.testing.assert_allclose(aux.metrics["weight_mean"], (weights * mask).sum() / mask.sum(), rtol=1e-5)


def test_q_star_is_a_constant_to_qtrans_q_tot():
    """Without TD loss nothing of Q's network moves, but the encoder of the agents' utilities and V do."""
    algo = every_algorithm()["qtran"]
    params, target = params_and_target(algo)
    batch = batch_of([4, 2], [True, False])._replace(reward=jnp.zeros((2, 4)))

    def q_tot_losses(params):
        metrics = loss_of(algo, params, target, batch)[1].metrics
        return metrics["opt_loss"] + metrics["nopt_loss"]

    reached = jax.tree.map(lambda g: bool((g != 0).any()), jax.jit(jax.grad(q_tot_losses))(params))
    assert not any(jax.tree.leaves((reached["mixer"]["q"], reached["mixer"]["action_encoding"])))
    assert all(jax.tree.leaves(reached["mixer"]["v"]))
    assert reached["agent"]["encoder"]["kernel"]


LAMBDA_LEARNERS = ("iql", "qplex", "qtran", "dcg", "ow_qmix", "qmix_cw")


@pytest.mark.parametrize("name", LAMBDA_LEARNERS)
@pytest.mark.parametrize("returns", ["td_lambda", "sarsa_lambda"])
def test_lambda_targets_of_padded_episodes(name, returns):
    """Row 0 is cut by the time limit after two steps and bootstraps there, row 1 terminates after three."""
    algo = dataclasses.replace(every_algorithm()[name], returns=returns, td_lambda=0.5)
    params, target = params_and_target(algo)
    batch = batch_of([2, 3], [False, True])
    greedy = greedy_of(algo, params, batch)[:, 1:]
    not_greedy = (greedy[0, 1] + 1) % ENV.spec.num_actions  # in the padding: were it read as taken, it would show
    batch = batch._replace(joint_action=batch.joint_action.at[0, 2].set(not_greedy))
    _, aux = loss_of(algo, params, target, batch)
    following = greedy
    if returns == "sarsa_lambda":  # what was taken next, where anything was
        following = greedy.at[0, 0].set(batch.joint_action[0, 1]).at[1, :2].set(batch.joint_action[1, 1:3])
        assert (following != greedy).any()
    value, reward = np.array(value_of(algo, target, batch, following)), np.array(batch.reward)
    expected = np.zeros_like(value)
    expected[0, 1] = reward[0, 1] + 0.9 * value[0, 1]
    expected[0, 0] = reward[0, 0] + 0.9 * (value[0, 0] + expected[0, 1]) / 2
    expected[1, 2] = reward[1, 2]
    for t in (1, 0):
        expected[1, t] = reward[1, t] + 0.9 * (value[1, t] + expected[1, t + 1]) / 2
    real = np.array(batch.mask) > 0
    np.testing.assert_allclose(aux.values["td_target"][real], expected[real], rtol=1e-5, atol=1e-6)


def value_before(algo, params, batch, joint_action):
    """`value_of` joint actions before each step: the episodes are shifted so that it reads those places."""
    repeated = [jnp.concatenate([leaf[:, :1], leaf], axis=1) for leaf in batch[:3]]
    shifted = Episode(*repeated, *(jnp.pad(leaf, [(0, 0), (1, 0)] + [(0, 0)] * (leaf.ndim - 2)) for leaf in batch[3:7]))
    starts = jnp.zeros(shifted.obs.shape[:2], bool).at[:, 1].set(True)
    with_start = shifted._replace(starts=starts)
    return value_of(algo, params, _drop_last(with_start), joint_action)


def _drop_last(batch):
    """An episode whose last observation, which nothing before each step reads, is missing."""
    firsts = (batch.obs, batch.state, batch.avail_actions)
    places = [leaf[:, :-1] for leaf in firsts]
    return Episode(*places, *(leaf[:, :-1] for leaf in batch[3:7]), starts=batch.starts[:, :-1])


@pytest.mark.parametrize("name", LAMBDA_LEARNERS)
@pytest.mark.parametrize("returns", ["q_lambda", "pymarl2_q_lambda"])
def test_q_lambda_corrects_actions_that_are_not_greedy(name, returns):
    """y = r + gamma (V' + lambda (y' - Q')), and PyMARL2's has V - Q of the step itself on top."""
    algo = dataclasses.replace(every_algorithm()[name], returns=returns, td_lambda=0.5)
    params, target = params_and_target(algo)
    batch = batch_of([2, 4], [False, True])
    greedy = greedy_of(algo, params, batch)
    _, aux = loss_of(algo, params, target, batch)
    following = np.array(value_of(algo, target, batch, greedy[:, 1:]))
    best = np.array(value_before(algo, target, batch, greedy[:, :-1]))
    taken = np.array(value_before(algo, target, batch, batch.joint_action))
    assert np.abs(best - taken).max() > 1e-3
    reward, expected = np.array(batch.reward), np.zeros_like(following)
    expected[0, 1] = reward[0, 1] + 0.9 * following[0, 1]
    expected[0, 0] = reward[0, 0] + 0.9 * (following[0, 0] + 0.5 * (expected[0, 1] - taken[0, 1]))
    expected[1, 3] = reward[1, 3]
    for t in (2, 1, 0):
        expected[1, t] = reward[1, t] + 0.9 * (following[1, t] + 0.5 * (expected[1, t + 1] - taken[1, t + 1]))
    if returns == "pymarl2_q_lambda":
        expected += best - taken
    real = np.array(batch.mask) > 0
    np.testing.assert_allclose(aux.values["td_target"][real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("returns", ["q_lambda", "pymarl2_q_lambda"])
def test_a_loss_without_corrections_is_refused(returns):
    algo = dataclasses.replace(every_algorithm()["vdn"], returns=returns)
    batch = batch_of([2, 4], [False, True])
    with pytest.raises(ConfigError, match=f"algo.returns={returns} is not allowed: the loss of QMIX has no correction"):
        algo.td_targets(batch, hyperparams(algo), batch.reward)


@pytest.mark.parametrize("name", LAMBDA_LEARNERS)
def test_n_step_targets_end_with_the_episode(name):
    algo = dataclasses.replace(every_algorithm()[name], returns="n_step", n_steps=3)
    params, target = params_and_target(algo)
    batch = batch_of([2, 4], [False, True])
    greedy = greedy_of(algo, params, batch)
    _, aux = loss_of(algo, params, target, batch)
    value, r, y = (
        np.array(value_of(algo, target, batch, greedy[:, 1:])),
        np.array(batch.reward),
        aux.values["td_target"],
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(y[0, 0], r[0, 0] + 0.9 * r[0, 1] + 0.81 * value[0, 1])
    close(y[1, 0], r[1, 0] + 0.9 * r[1, 1] + 0.81 * r[1, 2] + 0.729 * value[1, 2])
    close(y[1, 1], np.broadcast_to(r[1, 1] + 0.9 * r[1, 2] + 0.81 * r[1, 3], y[1, 1].shape))


@pytest.mark.parametrize(
    "name", ["iql", "vdn", "qplex", "qtran", "ow_qmix", "cw_qmix", "qmix_cw", "resq", "powqmix", "dcg"]
)
def test_without_double_q_the_target_agents_choose(name):
    """Other online utilities don't change the targets, those of the target agents do."""
    algo = dataclasses.replace(every_algorithm()[name], double_q=False)
    params, target = params_and_target(algo)
    batch = batch_of([4, 3], [False, False])
    _, aux = loss_of(algo, params, target, batch)
    acting = params | algo.acting_params(target)
    _, other = loss_of(algo, acting, target, batch)
    np.testing.assert_allclose(aux.values["td_target"], other.values["td_target"], rtol=1e-6)
    greedy = greedy_of(algo, target, batch)[:, 1:]
    following = np.array(value_of(algo, target, batch, greedy))
    axes = (...,) + (None,) * (following.ndim - 2)
    np.testing.assert_allclose(aux.values["td_target"], batch.reward[axes] + 0.9 * following, rtol=1e-5, atol=1e-6)
    double = dataclasses.replace(algo, double_q=True)
    _, doubled = loss_of(double, params, target, batch)
    assert not np.allclose(aux.values["td_target"], doubled.values["td_target"])


def test_lambda_0_is_the_default_target():
    """And lambda is traced: a sweep over it compiles once."""
    one_step = every_algorithm()["qmix"]
    td_lambda = dataclasses.replace(one_step, returns="td_lambda", td_lambda=0.0)
    assert hyperparams(td_lambda).td_lambda == 0.0
    params, target = params_and_target(one_step)
    batch = batch_of([4, 2], [True, False])
    _, plain = loss_of(one_step, params, target, batch)
    _, other = loss_of(td_lambda, params, target, batch)
    np.testing.assert_allclose(plain.values["td_target"], other.values["td_target"], rtol=1e-6)


def test_one_step_targets_trace_no_recursion():
    """The default costs what it did without the option."""
    batch = batch_of([4, 2], [True, False])

    def program(**changes):
        algo = dataclasses.replace(every_algorithm()["vdn"], **changes)
        return str(jax.make_jaxpr(lambda v: algo.td_targets(batch, hyperparams(algo), v))(batch.reward))

    assert "rev" not in program()
    assert "rev" in program(returns="td_lambda")  # from the last step to the first


def stepped_learner(algo, learner, batch):
    """Takes one optimiser step; returns the learner and the gradient's norm."""
    hp, noise = hyperparams(algo), algo.sample_noise(KEY, batch)
    grads, _ = jax.grad(algo.loss, has_aux=True)(learner.params, learner.target, batch, hp, CTX, noise)
    return apply_gradients(algo, learner, grads, hp)


def test_target_nets_move_once_the_interval_has_passed_each_seed_by_its_own_count():
    """At a difference of exactly 3 episodes and not of 2, and to the bit; a step itself leaves them alone."""
    algo = tiny_wqmix(target_update_interval=3)
    batch, hp = batch_of([4, 3], [False, True]), hyperparams(algo)
    learners = jax.vmap(lambda key: init_learner(algo, algo.init(key, ENV.spec)))(jax.random.split(KEY, 3))
    learners = learners._replace(target_episodes=jnp.array([5, 5, 4]))
    step = jax.vmap(lambda learner: stepped_learner(algo, learner, batch)[0])
    each = jax.tree.map(lambda leaf: jnp.full(3, leaf), hp)

    @jax.jit
    def iteration(learners, episodes):
        return copy_targets(step(learners), each, episodes, jnp.ones(3, bool))

    def copied(learners):
        leaves = zip(*map(jax.tree.leaves, (learners.params, learners.target)), strict=True)
        return np.all([(np.array(a) == np.array(b)).reshape(3, -1).all(1) for a, b in leaves], axis=0).tolist()

    some, none = iteration(learners, jnp.array([7, 8, 7])), iteration(learners, jnp.array([7, 7, 6]))
    assert copied(some) == [False, True, True]
    assert some.target_episodes.tolist() == [5, 8, 7]
    assert copied(none) == [False, False, False]
    assert none.target_episodes.tolist() == [5, 5, 4]
    for kept, before in zip(*map(jax.tree.leaves, (none.target, learners.target)), strict=True):
        np.testing.assert_array_equal(kept, before)


def test_one_optimiser_step_by_hand():
    """RMSProp from zero, epsilon outside the root: v = 0.01 g^2, p - lr g / (sqrt(v) + eps), g clipped jointly."""
    algo = tiny_wqmix(rms_eps=0.1, max_grad_norm=0.5)
    learner = init_learner(algo, algo.init(KEY, ENV.spec))
    batch = batch_of([4, 3], [False, True])
    grads = jax.grad(lambda p: loss_of(algo, p, learner.target, batch)[0])(learner.params)
    norm = np.sqrt(sum((np.array(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert norm > 0.5
    stepped, grad_norm = jax.jit(lambda: stepped_learner(algo, learner, batch))()
    np.testing.assert_allclose(grad_norm, norm, rtol=1e-5)
    for before, after, g in zip(*map(jax.tree.leaves, (learner.params, stepped.params, grads)), strict=True):
        g = np.array(g) * 0.5 / (norm + 1e-6)
        expected = np.array(before) - 0.01 * g / (np.sqrt(0.01 * g**2) + 0.1)
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-7)


def test_a_small_gradient_is_not_clipped():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, norm = clip_by_joint_norm(grads, jnp.float32(10))
    assert norm == 5.0
    np.testing.assert_array_equal(clipped["b"], [4.0])
    clipped, _ = clip_by_joint_norm(grads, jnp.float32(1))
    np.testing.assert_allclose(clipped["a"], [0.6], rtol=1e-5)


def test_a_joint_sum_is_that_of_all_leaves():
    """In both forms: leaf by leaf on a CPU, of all leaves joined on a GPU."""
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.float32(10), jnp.arange(4.0)]}
    assert joint_sum(tree) == 15 + 10 + 6
    assert "concatenate" in jax.jit(joint_sum).trace(tree).lower(lowering_platforms=("cuda",)).as_text()
    assert "concatenate" not in jax.jit(joint_sum).lower(tree).as_text()
