"""Environment recordings: every recorded step replayed through `PredatorPrey.transition`, equal to the bit."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.comparison import Arrays, Report
from wqmix_jax.config import load_group
from wqmix_jax.envs.predator_prey.task import EnvState, Noise, PredatorPrey
from wqmix_jax.options import build


def compare(arrays: Arrays, config: Mapping[str, Any]) -> Report:
    """Replays a recording and compares what each step led to, and what was seen before the first."""
    env = build_environment(config)
    report = Report()
    first = _state(arrays, "init/")._replace(steps=np.zeros(len(arrays["init/prey_alive"]), np.int32))
    _compare_seen(report, "init/", jax.jit(jax.vmap(env.observe))(first), arrays)

    after, outcome, seen = jax.jit(jax.vmap(_replay(env)))(
        _state(arrays, "step/pre_"), arrays["step/actions"].astype(np.int32), _noise(arrays)
    )
    recorded = _state(arrays, "step/post_")
    on_grid = recorded.agents_active | (not env.remove_frozen)  # what has left the grid has no place
    for field, where in (
        ("agents_pos", on_grid),
        ("prey_pos", recorded.prey_alive),
        ("prey_alive", None),
        ("agents_active", None),
        ("steps", None),
    ):
        report.compare(f"step/post_{field}", getattr(after, field), getattr(recorded, field), where=where)
    _compare_seen(report, "step/post_", seen, arrays)
    at_limit = arrays["step/episode_limit"] > 0
    report.compare("step/reward", outcome.reward, arrays["step/reward"].astype(np.float32))
    report.compare("step/episode_limit", outcome.truncated, at_limit)
    report.compare("step/terminated", outcome.terminated, (arrays["step/terminated"] > 0) != at_limit)
    return report


def build_environment(config: Mapping[str, Any]) -> PredatorPrey:
    """The task that a recording's options describe."""
    stag_catchers, hare_catchers = config["capture_action_conditions"]
    [radius] = set(config["agent_obs"])
    return build(
        "env",
        load_group("env", "predator_prey")
        | {
            "world_shape": config["world_shape"],
            "toroidal": config["toroidal"],
            "num_agents": config["n_agents"],
            "num_stags": config["n_stags"],
            "num_hares": config["n_hare"],
            "obs_radius": radius,
            "punishment": config["miscapture_punishment"],
            "stag_catchers": stag_catchers,
            "hare_catchers": hare_catchers,
            "reward_stag": config["reward_stag"],
            "reward_hare": config["reward_hare"],
            "capture_freezes": config["capture_freezes"],
            "remove_frozen": config["remove_frozen"],
            "episode_limit": config["episode_limit"],
        },
    )


def _replay(env: PredatorPrey) -> Any:
    def replay(env_state: EnvState, joint_action: jax.Array, noise: Noise) -> tuple[Any, ...]:
        after, outcome = env.transition(env_state, joint_action, noise)
        return after, outcome, env.observe(after)

    return replay


def _state(arrays: Arrays, prefix: str) -> EnvState:
    return EnvState(
        agents_pos=arrays[f"{prefix}agents_pos"].astype(np.int32),
        prey_pos=arrays[f"{prefix}prey_pos"].astype(np.int32),
        prey_alive=arrays[f"{prefix}prey_alive"] > 0,
        agents_active=arrays[f"{prefix}agents_active"] > 0,
        steps=arrays[f"{prefix}steps"].astype(np.int32) if f"{prefix}steps" in arrays else None,
    )


def _noise(arrays: Arrays) -> Noise:
    return Noise(
        agent_order=arrays["step/agent_order"].astype(np.int32),
        prey_order=arrays["step/prey_order"].astype(np.int32),
        prey_uniform=jnp.asarray(arrays["step/prey_uniform"], jnp.float32),
    )


def _compare_seen(report: Report, prefix: str, seen: Any, arrays: Arrays) -> None:
    report.compare(f"{prefix}obs", seen.obs, arrays[f"{prefix}obs"])
    report.compare(f"{prefix}state", seen.state, arrays[f"{prefix}state"])
    report.compare(f"{prefix}avail", seen.avail_actions, arrays[f"{prefix}avail"])
