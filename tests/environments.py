"""Diagnostic environments and algorithms whose every step is known beforehand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import AgentInputs, Algorithm, Aux, Context, hyperparams, with_values
from wqmix_jax.config import load_group
from wqmix_jax.envs.base import Environment
from wqmix_jax.ops.moments import no_moments
from wqmix_jax.options import build, options
from wqmix_jax.training.batch_gradients import return_moments
from wqmix_jax.training.learner import standardised
from wqmix_jax.types import Array, EnvSpec, Observation, StepOutcome


class ClockState(NamedTuple):
    """``steps`` and what was done at each of them, ``[T, N]`` (-1 where nothing was yet)."""

    steps: Array
    history: Array


@options
class Clock(Environment):
    """Two agents; observations show the time, the reward of step t is t + 1.

    Action 2 of agent 0 ends the task once ``ends_from`` steps are played; otherwise the time limit cuts the episode.
    Agent 1 may never play action ``t % 3`` at step t.
    """

    episode_limit: int
    ends_from: int

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(num_agents=2, num_actions=3, obs_dim=2, state_dim=3, episode_limit=self.episode_limit)

    def reset(self, key: Any) -> ClockState:
        return ClockState(jnp.int32(0), jnp.full((self.episode_limit, 2), -1, jnp.int32))

    def step(self, env_state: ClockState, joint_action: Array, key: Any) -> tuple[ClockState, StepOutcome]:
        history = env_state.history.at[env_state.steps].set(joint_action)
        following = ClockState(env_state.steps + 1, history)
        truncated = following.steps >= self.episode_limit
        terminated = (joint_action[0] == 2) & (following.steps > self.ends_from) & ~truncated
        return following, StepOutcome(following.steps.astype(jnp.float32), terminated, truncated)

    def observe(self, env_state: ClockState) -> Observation:
        time = env_state.steps.astype(jnp.float32)
        avail = jnp.ones((2, 3), bool).at[1, env_state.steps % 3].set(False)
        obs = jnp.stack([jnp.stack([time, jnp.float32(1)]), jnp.stack([-time, jnp.float32(2)])])
        return Observation(obs, jnp.stack([time, time * time, jnp.float32(1)]), avail)


@options
class Leaver(Clock):
    """A `Clock` whose agent 1 leaves after the first step: from then on it has no available action."""

    def observe(self, env_state: ClockState) -> Observation:
        seen = super().observe(env_state)
        stays = jnp.stack([jnp.bool_(True), env_state.steps < 1])[:, None]
        return seen._replace(avail_actions=seen.avail_actions & stays)


class RecallState(NamedTuple):
    """``steps`` and each agent's ``cue``, ``[N]`` int32, 0 or 1."""

    steps: Array
    cue: Array


@options
class Recall(Environment):
    """Two steps; the right action of the second is what was seen at the first, where there is nothing to choose.

    Pays the share of agents that play their own cue. Who recalls it gets 1, who doesn't 1/2 on average, whatever the
    policy. The state shows the cues at both steps, the observations at the first alone.
    """

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(num_agents=2, num_actions=2, obs_dim=2, state_dim=3, episode_limit=2)

    def reset(self, key: Any) -> RecallState:
        return RecallState(jnp.int32(0), jax.random.bernoulli(key, 0.5, (2,)).astype(jnp.int32))

    def step(self, env_state: RecallState, joint_action: Array, key: Any) -> tuple[RecallState, StepOutcome]:
        following = env_state._replace(steps=env_state.steps + 1)
        ends = following.steps == 2
        reward = jnp.where(ends, (joint_action == env_state.cue).mean(), 0.0)
        return following, StepOutcome(reward, ends, jnp.bool_(False))

    def observe(self, env_state: RecallState) -> Observation:
        first, sign = env_state.steps == 0, 2.0 * env_state.cue - 1.0
        obs = jnp.stack([jnp.where(first, sign, 0.0), jnp.full(2, first, jnp.float32)], axis=-1)
        state = jnp.concatenate([sign, first.astype(jnp.float32)[None]])
        avail = jnp.stack([jnp.ones(2, bool), jnp.full(2, ~first)], axis=-1)
        return Observation(obs, state, avail)


# Narrow nets and few episodes; the rest as in the yamls.
TINY = load_group("algo", "_base") | {
    "gamma": 0.9,
    "lr": 0.01,
    "batch_size": 2,
    "buffer_size": 6,
    "target_update_interval": 3,
    "epsilon_finish": 0.1,
    "epsilon_anneal_steps": 40,
    "hidden_dim": 5,
}
AGENT = load_group("algo", "_agent")
"""The options of a `QLearner`'s agents."""

TD = load_group("algo", "_td") | TINY
QMIX = TD | {"mixer": "qmix", "mixer_embed_dim": 4, "hypernet_dim": 3, "num_heads": 2}
WQMIX = QMIX | {"weighting": "central", "alpha": 0.1, "q_star": "feedforward", "q_star_dim": 6}


def tiny_wqmix(**changes: Any) -> Algorithm:
    """CW-QMIX with narrow nets."""
    return build("algo", {"_target_": "wqmix_jax.algos.wqmix.WQMIX", **WQMIX, **changes})


def tiny_resq(**changes: Any) -> Algorithm:
    """ResQ with narrow nets."""
    own = {"weighting": "uniform", "residual_sign": "loss"}
    return build("algo", {"_target_": "wqmix_jax.algos.resq.ResQ", **WQMIX, **own, **changes})


def tiny_powqmix(**changes: Any) -> Algorithm:
    """POWQMIX, which takes its own steps, with narrow nets; rounding doesn't decide the direction of a step."""
    own = {"weighting": "potentially_optimal", "alpha": 0.0, "threshold": 0.02, "no_weighted_steps": 0}
    own |= {"recognizer_steps": 3, "recognizer_v_dim": 4, "recognizer_hypernet_dim": 4, "recognizer_embed_dim": 3}
    own |= {"optimizer": "adam", "adam_eps": 0.01}
    return build("algo", {"_target_": "wqmix_jax.algos.powqmix.POWQMIX", **WQMIX, **own, **changes})


def tiny_masac(**changes: Any) -> Algorithm:
    """MASAC, whose loss draws, with narrow nets."""
    own = {"alpha_ent": 0.3, "q_star_dim": 6}
    return build("algo", {"_target_": "wqmix_jax.algos.masac.MASAC", **AGENT, **TINY, **AGENT, **own, **changes})


def tiny_maddpg(**changes: Any) -> Algorithm:
    """MADDPG with narrow nets."""
    own = {"gumbel_temperature": 0.5, "q_star_dim": 6}
    return build("algo", {"_target_": "wqmix_jax.algos.maddpg.MADDPG", **AGENT, **TINY, **AGENT, **own, **changes})


def tiny_ppo(**changes: Any) -> Algorithm:
    """MAPPO with narrow nets; ``num_envs`` must be the size of its buffer."""
    own = load_group("algo", "mappo") | {"hidden_dim": 5, "batch_size": 2, "buffer_size": 4, "gamma": 0.9}
    return build("algo", own | changes)


def hp_of_loss(algo: Algorithm, target: Any, batch: Any) -> Any:
    """The traced options with what a loss reads in addition, for the first iteration of an on-policy algorithm."""
    hp = hyperparams(algo)
    if not algo.target_has_played:
        return hp
    moments = {name: no_moments() for name in standardised(algo)}
    hp = with_values(hp, return_moments(moments) | return_moments(moments, "played_"))
    return with_values(hp, algo.played_means(target, batch, hp).metrics)


def tiny_dcg(**changes: Any) -> Algorithm:
    """DCG, whose agents act together, with narrow nets."""
    graph = {"graph": "full", "payoff_rank": None, "payoff_layers": 0, "duelling": True, "mixer_embed_dim": 4}
    messages = {"iterations": 4, "anytime": True, "normalised": True}
    return build("algo", {"_target_": "wqmix_jax.algos.dcg.DCG", **TD, **graph, **messages, **changes})


def tiny_coma(**changes: Any) -> Any:
    """COMA with narrow nets; ``num_envs`` must be the size of its buffer."""
    own = load_group("algo", "coma") | {"hidden_dim": 5, "critic_dim": 6, "batch_size": 2, "buffer_size": 2}
    return build("algo", own | {"gamma": 0.9, "lr": 0.01} | changes)


def tiny_liir(**changes: Any) -> Any:
    """LIIR with narrow nets; ``num_envs`` must be the size of its buffer."""
    own = load_group("algo", "liir") | {"hidden_dim": 5, "critic_dim": 6, "batch_size": 2, "buffer_size": 2}
    return build("algo", own | {"gamma": 0.9, "lr": 0.01} | changes)


def tiny_run(algo: Algorithm, env: Environment, **changes: Any) -> Any:
    """A run of a few small episodes."""
    from wqmix_jax.config import CheckpointOptions, LoggerOptions, RunConfig, run_defaults

    values: dict[str, Any] = {
        **run_defaults(),
        "total_env_steps": 10_000,
        "eval_interval": env.spec.episode_limit,
        "eval_episodes": 2,
        "chunk_iterations": 1,
        "checkpoint": CheckpointOptions(every=1000, keep=1),
        "logger": LoggerOptions(
            wandb="disabled", project="test", group=None, tensorboard=False, csv=False, progress=False
        ),
    }
    return RunConfig(algo=algo, env=env, **(values | changes))


def drawn_latent(algo: Algorithm, spec: EnvSpec, batch_shape: tuple[int, ...]) -> Any:
    """A latent for each of these episodes, ``()`` if the algorithm draws none."""
    params, ctx = algo.init(jax.random.key(0), spec), Context(jnp.float32(1), jnp.int32(0), jnp.int32(0))
    state = jnp.zeros((*batch_shape, spec.state_dim))
    return algo.draw_latent(params, state, hyperparams(algo), ctx, jax.random.key(1))


def at_places(latent: Any, num_places: int) -> Any:
    """The latents of whole episodes as `Episode.latent` has them, ``[B, ..]`` -> ``[B, T+1, ..]``."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], num_places, axis=1), latent)


@options
class Counting(Algorithm):
    """Acts from what the loop feeds it, without parameters that matter; a misaligned loop shows in the actions.

    Agent 0 plays ``(last_action + 1) % 3``, so 0, 1, 2, 0, .. from a first last action of -1. Agent 1 plays the count
    in its carry, ``count % 3``, so 0, 1, 2, .. from a carry that starts at zero.
    """

    def init(self, key: Any, env_spec: EnvSpec) -> Any:
        return {"unused": jnp.zeros(1)}

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Array:
        return jnp.zeros(batch_shape, jnp.int32)

    def act(
        self, params: Any, carry: Array, inputs: AgentInputs, hp: Any, ctx: Context, key: Any
    ) -> tuple[Array, Array]:
        joint_action = jnp.stack([(inputs.last_action[..., 0] + 1) % 3, carry[..., 1] % 3], axis=-1)
        return joint_action, carry + 1

    def loss(self, params: Any, target: Any, batch: Any, hp: Any, ctx: Context, noise: Any) -> tuple[Array, Aux]:
        loss = jnp.square(params["unused"] - 1).sum()
        return loss, Aux({"loss": loss}, {})


@options
class WithoutLossMetric(Counting):
    """Leaves its loss out of the metrics."""

    def loss(self, params: Any, target: Any, batch: Any, hp: Any, ctx: Context, noise: Any) -> tuple[Array, Aux]:
        loss, _ = super().loss(params, target, batch, hp, ctx, noise)
        return loss, Aux({"value": loss}, {})


@options
class EpsilonTeller(Counting):
    """Plays action 1 where epsilon is what it was at the start of the first episode, action 0 otherwise."""

    def act(
        self, params: Any, carry: Array, inputs: AgentInputs, hp: Any, ctx: Context, key: Any
    ) -> tuple[Array, Array]:
        same = (ctx.epsilon == hp.epsilon_start).astype(jnp.int32)
        return jnp.full(inputs.last_action.shape, same), carry


@options
class ContextTeller(Counting):
    """Reports the context that its loss receives."""

    def loss(self, params: Any, target: Any, batch: Any, hp: Any, ctx: Context, noise: Any) -> tuple[Array, Aux]:
        loss, _ = super().loss(params, target, batch, hp, ctx, noise)
        return loss, Aux({"loss": loss, **ctx._asdict()}, {})


def by_seed(tree: Any) -> Any:
    """Adds a seed axis of one."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)
