import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tabular.deep import OVERRIDES, Q_STAR, SPEC, _learnt, every_joint_action
from experiments.tabular.games import random_games
from wqmix_jax import load_config


def test_a_batch_plays_every_joint_action_once() -> None:
    payoff = random_games(1)[0]
    batch = every_joint_action(jnp.asarray(payoff, jnp.float32))
    joint_actions = [tuple(each) for each in batch.joint_action[:, 0].tolist()]
    assert sorted(joint_actions) == sorted(np.ndindex(3, 3))
    for joint_action, reward in zip(joint_actions, batch.reward[:, 0], strict=True):
        np.testing.assert_allclose(reward, payoff[joint_action], rtol=1e-6)
    assert not batch.discount.any()
    assert batch.obs.shape == (9, 2, 2, 1)


@pytest.mark.parametrize(("name", "options"), [("qmix", ()), ("ow_qmix", Q_STAR)])
def test_trained_nets_have_a_value_of_every_joint_action(name: str, options: tuple[str, ...]) -> None:
    algo = load_config(f"+algo={name}", *OVERRIDES, *options).algo
    batch = every_joint_action(jnp.ones((3, 3)))
    q_tot, greedy = jax.eval_shape(lambda: _learnt(algo, algo.init(jax.random.key(0), SPEC), batch))
    assert (q_tot.shape, greedy.shape) == ((9,), (2,))


def test_games_do_not_depend_on_how_many_there_are() -> None:
    np.testing.assert_array_equal(random_games(5)[:2], random_games(2))
