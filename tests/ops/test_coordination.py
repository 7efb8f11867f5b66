"""Coordination graphs: edges, values and messages by hand, and greedy joint actions against brute force."""

import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.harness import GOLDEN
from wqmix_jax.ops import coordination
from wqmix_jax.ops.coordination import GraphValues, greedy_joint_actions, joint_value, named_edges

HOW = {"iterations": 8, "anytime": True, "normalised": True}
PAIR = ((0, 1),)
# Two agents with two actions: the best joint action is (1, 1), worth (0 + 2) / 2 + 6.
BY_HAND = GraphValues(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[[4.0, 0.0], [2.0, 6.0]]]))


@functools.partial(jax.jit, static_argnames=("edges", "iterations", "anytime", "normalised"))
def greedy(values: GraphValues, avail_actions: Any, edges: Any, **how: Any) -> Any:
    return greedy_joint_actions(values, avail_actions, edges, **(HOW | how))


@pytest.mark.parametrize(
    ("graph", "num_agents", "edges"),
    [
        ("full", 4, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("line", 4, [(0, 1), (1, 2), (2, 3)]),
        ("cycle", 4, [(0, 1), (1, 2), (2, 3), (3, 0)]),
        ("cycle", 2, [(0, 1)]),
        ("star", 4, [(0, 1), (0, 2), (0, 3)]),
        ("vdn", 4, []),
        ("full", 1, []),
        ("cycle", 1, []),
    ],
)
def test_named_graphs(graph: Any, num_agents: int, edges: list[tuple[int, int]]) -> None:
    assert named_edges(graph, num_agents) == tuple(edges)


def test_a_value_is_the_mean_utility_plus_the_mean_payoff() -> None:
    assert joint_value(BY_HAND, jnp.array([0, 1]), PAIR) == (1 + 2) / 2 + 0
    assert joint_value(BY_HAND, jnp.array([1, 0]), PAIR) == (0 + 0) / 2 + 2
    assert joint_value(BY_HAND, jnp.array([1, 0]), ()) == 0
    both_ways = BY_HAND._replace(payoffs=jnp.concatenate([BY_HAND.payoffs, 10 * BY_HAND.payoffs]))
    assert joint_value(both_ways, jnp.array([1, 0]), ((0, 1), (1, 0))) == (2 + 0) / 2


def test_messages_of_two_agents_by_hand() -> None:
    """Utilities are divided by the two agents. A message says how good the best answer to each action is."""
    own = BY_HAND.utilities / 2  # [0.5, 0] and [0, 1]
    plain = coordination._sums_with_messages(own, BY_HAND.payoffs, PAIR, 2, normalised=False)
    # To agent 1: max(0.5 + 4, 2), max(0.5, 6); to agent 0: max(4, 1), max(2, 1 + 6). Both are then the best values that
    # an action can have, and a second iteration, which leaves out what the receiver said, changes nothing.
    np.testing.assert_allclose(plain, [[[4.5, 7], [4.5, 7]]] * 2)
    normalised = coordination._sums_with_messages(own, BY_HAND.payoffs, PAIR, 2, normalised=True)
    np.testing.assert_allclose(normalised, [[[-1, 1.5], [-0.75, 1.75]]] * 2)  # less 5.5 and 5.25
    assert greedy(BY_HAND, jnp.ones((2, 2), bool), PAIR).tolist() == [1, 1]
    assert greedy(BY_HAND, jnp.array([[True, True], [True, False]]), PAIR).tolist() == [0, 0]
    assert greedy(BY_HAND, jnp.ones((2, 2), bool), PAIR, iterations=0).tolist() == [0, 1]
    assert greedy(BY_HAND, jnp.ones((2, 2), bool), ()).tolist() == [0, 1]


def test_anytime_keeps_the_best_joint_action_of_all_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = jnp.array([[[0.0, 1], [1, 0]], [[0, 1], [0, 1]], [[1, 0], [0, 1]]])  # (1, 0), (1, 1), (0, 1)
    monkeypatch.setattr(coordination, "_sums_with_messages", lambda *args, **how: sums)
    avail, how = jnp.ones((2, 2), bool), {"iterations": 3, "normalised": True}
    assert greedy_joint_actions(BY_HAND, avail, PAIR, anytime=True, **how).tolist() == [1, 1]
    assert greedy_joint_actions(BY_HAND, avail, PAIR, anytime=False, **how).tolist() == [0, 1]


def problems(num_agents: int, num_edges: int, seed: int = 0) -> tuple[GraphValues, Any]:
    """Sixty states with three actions, of which a part is not available."""
    keys = jax.random.split(jax.random.key(seed), 3)
    utilities = jax.random.normal(keys[0], (60, num_agents, 3))
    payoffs = 2 * jax.random.normal(keys[1], (60, num_edges, 3, 3))
    avail = jax.random.bernoulli(keys[2], 0.7, (60, num_agents, 3)).at[..., 1].set(True)
    return GraphValues(utilities, payoffs), avail


def best_values(values: GraphValues, avail: Any, edges: Any) -> Any:
    """Returns the largest value of any available joint action, ``[60]``."""
    num_agents = avail.shape[1]
    every = np.array(list(itertools.product(range(3), repeat=num_agents)))
    all_values = jax.vmap(lambda one: joint_value(values, jnp.broadcast_to(one, avail.shape[:2]), edges))(every)
    is_possible = np.array(avail)[:, np.arange(num_agents), every].all(-1).T
    return np.where(is_possible, all_values, -np.inf).max(0)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("anytime", [True, False])
@pytest.mark.parametrize(
    "edges",
    [
        ((0, 1), (1, 2), (2, 3)),  # a line
        ((0, 1), (0, 2), (0, 3), (0, 4)),  # a star
        ((2, 0), (3, 1), (1, 0), (4, 3)),
        ((3, 1), (0, 2)),  # two trees, and agent 4 alone
    ],
)
def test_on_trees_messages_find_what_brute_force_finds(edges: Any, anytime: bool, normalised: bool) -> None:
    num_agents = 4 if edges[-1] == (2, 3) else 5
    values, avail = problems(num_agents, len(edges))
    found = greedy(values, avail, edges, anytime=anytime, normalised=normalised)
    assert np.take_along_axis(np.array(avail), np.array(found)[..., None], -1).all()
    np.testing.assert_allclose(joint_value(values, found, edges), best_values(values, avail, edges), rtol=1e-5)


@pytest.mark.parametrize(
    ("file", "how", "share"),
    [(0, {}, 1), (1, {}, 0.925), (1, {"anytime": False}, 0.825), (1, {"iterations": 0}, 0.15)],
)
def test_on_full_graphs_messages_find_the_recorded_share(file: int, how: dict[str, Any], share: float) -> None:
    with np.load(GOLDEN / f"learner_dcg_greedy_public_{file}.npz") as arrays:
        values = GraphValues(jnp.asarray(arrays["f_i"]), jnp.asarray(arrays["full/f_ij"]))
        avail, best = jnp.asarray(arrays["avail_actions"] > 0), arrays["full/best_value"]
        num_agents = json.loads(str(arrays["config_json"]))["n_agents"]
    edges = named_edges("full", num_agents)
    found = joint_value(values, greedy(values, avail, edges, **how), edges)
    assert np.isclose(found, best, rtol=1e-5).mean() == share


def test_equally_good_actions_are_the_first_of_them() -> None:
    sums = jnp.array([[1.0, 1.0 + 1e-6, 0.5], [1.0, 1.0 + 1e-4, 0.5], [jnp.nan, 1.0, 3.0]])
    avail = jnp.array([[True, True, True], [True, True, True], [False, True, True]])
    assert coordination._first_best(sums[:2], avail[:2]).tolist() == [0, 1]
    assert coordination._first_best(sums[:1], avail[2:]).tolist() == [1]
    assert coordination._first_best(sums[2:], avail[2:]).tolist() == [2]


def test_rounding_decides_nothing_around_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages meet the same terms in another order there, and some sums are equal to rounding."""
    edges = named_edges("full", 3)
    values, avail = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (32, *leaf.shape)), problems(3, 3))
    nudged = jax.tree.map(lambda leaf: leaf * (1 + 1.2e-7 * jax.random.normal(jax.random.key(1), leaf.shape)), values)

    def differ() -> int:
        found = jax.jit(lambda values: greedy_joint_actions(values, avail, edges, **HOW))(nudged)
        return int((found != found[:1]).any(-1).sum())

    assert differ() == 0
    monkeypatch.setattr(coordination, "TIE", 0)
    assert differ() > 0


def test_an_agent_without_an_action_may_take_all_and_disturbs_no_other_state() -> None:
    edges = named_edges("full", 4)
    values, avail = problems(4, len(edges))
    padded = avail.at[:30, 2].set(False).at[:10].set(False)
    found = greedy(values, padded, edges)
    np.testing.assert_array_equal(found, greedy(values, jnp.where(padded.any(-1, keepdims=True), padded, True), edges))
    np.testing.assert_array_equal(found[30:], greedy(values, avail, edges)[30:])
    own = jnp.where(padded, values.utilities, -jnp.inf)
    assert jnp.isfinite(own).any(-1)[30:].all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("anytime", [True, False])
def test_whatever_the_values_are_actions_are_available(value: float, anytime: bool) -> None:
    edges = named_edges("full", 4)
    values, avail = problems(4, len(edges))
    for broken in (
        values._replace(payoffs=values.payoffs.at[:, 0].set(value)),
        jax.tree.map(lambda leaf: jnp.full_like(leaf, value), values),
    ):
        found = greedy(broken, avail, edges, anytime=anytime)
        assert np.take_along_axis(np.array(avail), np.array(found)[..., None], -1).all()


def test_leading_axes_are_states() -> None:
    edges = named_edges("cycle", 4)
    values, avail = problems(4, len(edges))
    shaped = jax.tree.map(lambda leaf: leaf.reshape(3, 20, *leaf.shape[1:]), (values, avail))
    np.testing.assert_array_equal(greedy(*shaped, edges).reshape(60, 4), greedy(values, avail, edges))
    one = jax.tree.map(lambda leaf: leaf[7], (values, avail))
    np.testing.assert_array_equal(greedy(*one, edges), greedy(values, avail, edges)[7])


def test_the_gradient_is_that_of_the_value_at_a_fixed_joint_action() -> None:
    values, avail = jax.tree.map(lambda leaf: leaf[0], problems(3, 3))
    edges = named_edges("full", 3)
    found = greedy(values, avail, edges)
    grads = jax.grad(lambda v: joint_value(v, greedy_joint_actions(v, avail, edges, **HOW), edges))(values)
    np.testing.assert_allclose(grads.utilities, jax.nn.one_hot(found, 3) / 3, rtol=1e-6)
    first, second = np.array(edges).T
    pairs = jax.nn.one_hot(found[first], 3)[:, :, None] * jax.nn.one_hot(found[second], 3)[:, None]
    np.testing.assert_allclose(grads.payoffs, pairs / 3, rtol=1e-6)
