"""The files of policies, and which of two policies is kept."""

from typing import Any

import numpy as np

from wqmix_jax.runs.saved_policies import Policy, better, finite_members, no_policy
from wqmix_jax.runs.session import _new_returns
from wqmix_jax.training.members import Member


def policy(number: float, env_steps: list[int], returns: list[float]) -> Policy:
    """Policies whose parameters are all the same number."""
    params = {"bias": np.full((len(returns), 2), number, np.float32)}
    return Policy(params, np.array(env_steps, np.int32), np.array(returns, np.float32))


def kept(found: Policy) -> list[tuple[Any, ...]]:
    return list(
        zip(found.params["bias"][:, 0].tolist(), found.env_steps.tolist(), found.episode_return.tolist(), strict=True)
    )


def test_of_trained_policies_the_higher_return_is_kept() -> None:
    old, new = policy(1, [10, 10, 10], [2.0, 2.0, 2.0]), policy(2, [20, 20, 20], [3.0, 2.0, np.nan])
    assert kept(better(old, new)) == [(2, 20, 3), (1, 10, 2), (1, 10, 2)]


def test_the_first_trained_policy_replaces_the_untrained_one_whatever_its_return() -> None:
    untrained = better(no_policy({"bias": np.zeros((2, 2), np.float32)}), policy(1, [0, 0], [-18.0, 5.0]))
    assert kept(untrained) == [(1, 0, -18), (1, 0, 5)]
    assert better(untrained, policy(2, [7, 7], [np.nan, np.nan])) is untrained  # not evaluated
    trained = better(untrained, policy(3, [10, 10], [-85.5, np.nan]))
    assert kept(trained) == [(3, 10, -85.5), (1, 0, 5)]
    assert kept(better(trained, policy(4, [20, 20], [-90.0, -90.0]))) == [(3, 10, -85.5), (4, 20, -90)]


def test_finite_members_are_those_without_nan_and_inf() -> None:
    params = {"scale": np.zeros(3), "bias": np.array([[0, 1], [np.nan, 0], [0, -np.inf]])}
    assert finite_members(params).tolist() == [True, False, False]


def test_nets_that_have_not_learned_since_step_0_are_no_new_policy() -> None:
    def line(seed: int, env_steps: int, learner_steps: int, kind: str = "eval") -> dict[str, Any]:
        counters = {"env_steps": env_steps, "learner_steps": learner_steps}
        return {"kind": kind, "seed": seed, **counters, "episode_return": float(env_steps)}

    members = [Member(seed) for seed in (3, 4, 5)]
    lines = [line(5, 0, 0), line(4, 20, 0), line(3, 30, 1), line(4, 40, 1, kind="train")]
    np.testing.assert_array_equal(_new_returns(members, lines), [30, np.nan, 0])
