"""The payoff network against its definition, pair by pair."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.coordination import PairPayoffs
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.ops.coordination import GraphValues, joint_value, named_edges

FORMS = [{}, {"rank": 2}, {"hidden_dims": (7, 5)}, {"rank": 1, "hidden_dims": (7,)}]
HIDDEN = jax.random.normal(jax.random.key(0), (6, 4, 3))


def drawn(edges: Any, form: dict[str, Any]) -> tuple[PairPayoffs, Any]:
    net = PairPayoffs(edges, 5, **form)
    return net, init_net(net, jax.random.key(1), HIDDEN)


def one_order(params: Any, form: dict[str, Any], one: Any, other: Any) -> Any:
    """The network's matrix for [h_i; h_j], from its definition."""
    outputs = np.concatenate([one, other], axis=-1)
    for layer in range(len(params)):
        weights = jax.tree.map(np.asarray, params[f"layer_{layer}"])
        outputs = (np.maximum(outputs, 0) if layer else outputs) @ weights["kernel"] + weights["bias"]
    if "rank" not in form:
        return outputs.reshape(-1, 5, 5)
    vectors = outputs.reshape(-1, form["rank"], 2, 5)
    return sum(vectors[:, k, 0, :, None] * vectors[:, k, 1, None, :] for k in range(form["rank"]))


@pytest.mark.parametrize("form", FORMS)
def test_a_payoff_is_the_mean_of_both_orders(form: dict[str, Any]) -> None:
    edges = ((2, 0), (1, 3), (0, 1))
    net, params = drawn(edges, form)
    payoffs = apply_net(net, params, HIDDEN)
    assert payoffs.shape == (6, 3, 5, 5)
    for edge, (i, j) in enumerate(edges):
        one, other = HIDDEN[:, i], HIDDEN[:, j]
        expected = one_order(params, form, one, other), one_order(params, form, other, one)
        expected = (expected[0] + expected[1].swapaxes(1, 2)) / 2
        np.testing.assert_allclose(payoffs[:, edge], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_exchanging_agents_changes_no_payoff_and_no_value(form: dict[str, Any]) -> None:
    """The agents of an edge, and all agents of a full graph with their hidden states and actions."""
    (net, params), (backward, _) = drawn(((0, 1),), form), drawn(((1, 0),), form)
    payoffs = apply_net(net, params, HIDDEN)
    assert not np.allclose(payoffs, payoffs.swapaxes(-1, -2), atol=1e-3)
    np.testing.assert_allclose(apply_net(backward, params, HIDDEN), payoffs.swapaxes(-1, -2), rtol=1e-5, atol=1e-6)
    edges, order = named_edges("full", 4), np.array([2, 0, 3, 1])
    full, params = drawn(edges, form)
    utilities, actions = jax.random.normal(jax.random.key(2), (6, 4, 5)), jnp.array([[0, 4, 2, 1]] * 6)
    values = [
        joint_value(GraphValues(utilities[:, each], apply_net(full, params, HIDDEN[:, each])), actions[:, each], edges)
        for each in (np.arange(4), order)
    ]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


def test_low_ranks_are_low() -> None:
    net, params = drawn(((0, 1),), {"rank": 1})
    singular = np.linalg.svd(apply_net(net, params, HIDDEN), compute_uv=False)
    assert (singular[..., 2:] < 1e-5).all()  # one outer product for each order
    assert (singular[..., 1] > 1e-4).all()
