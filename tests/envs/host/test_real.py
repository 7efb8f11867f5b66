"""The adapters with a real SMAC, SMACv2 or SMAClite, if `WQMIX_JAX_REAL` names one.

``WQMIX_JAX_REAL="env=smac env.map=3m env.worker_python=/path/to/python" pytest tests/envs/host/test_real.py``
"""

import os

import numpy as np
import pytest

from tests.envs.host.running import called, idle_where
from wqmix_jax import load_config

OVERRIDES = os.environ.get("WQMIX_JAX_REAL", "").split()

pytestmark = pytest.mark.skipif(not OVERRIDES, reason="WQMIX_JAX_REAL names no environment")


def test_two_episodes_are_played_at_random_to_their_ends() -> None:
    env, rng = load_config("+algo=iql", *OVERRIDES).env, np.random.default_rng(0)
    assert env.external.versions()
    supervisor, spec = env.external.supervisor, env.spec
    with env.external.running([0]):
        for seeds in ([1, 2], [3, 4]):
            obs, state, avail, metrics, *_, failed = called(supervisor, "reset", np.array(seeds))
            ended = failed.copy()
            for _ in range(spec.episode_limit):
                assert avail.any(-1).all()
                assert np.isfinite(obs).all()
                assert np.isfinite(state).all()
                joint_action = np.where(avail, rng.random(avail.shape), -1).argmax(-1)
                obs, state, avail, metrics, _, terminated, truncated, failed = called(
                    supervisor, "step", idle_where(ended, joint_action)
                )
                assert not failed.any()
                ended |= terminated | truncated
                if ended.all():
                    break
            assert set(np.unique(metrics[:, 0])) <= {0.0, 1.0}
        assert env.external.facts() == {"worker_restarts": 0}
