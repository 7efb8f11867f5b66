"""The structures that several modules share, and the axis legend.

Axes: ``S`` seeds (in a sweep: members), ``B`` batch of episodes, ``R`` rows of a batch, ``T`` time steps, ``N`` agents,
``A`` actions, ``O`` observation features, ``D`` state features, ``H`` hidden units, ``E`` environments of one seed,
``F`` all environments (``S * E``), ``K`` iterations, ``P`` prey; in nets, ``I`` and ``F`` are input and output
features, and ``K`` attention heads. ``..`` is any number of leading axes.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
PRNGKey = jax.Array
PyTree = Any


class EnvSpec(NamedTuple):
    """The static sizes of an environment.

    Attributes:
        num_agents: ``N``.
        num_actions: ``A``, the same for every agent.
        obs_dim: ``O``, features of one agent's local observation.
        state_dim: ``D``, features of the global state.
        episode_limit: the most environment steps of one episode, ``T``.
    """

    num_agents: int
    num_actions: int
    obs_dim: int
    state_dim: int
    episode_limit: int


class Observation(NamedTuple):
    """The observation before an action is taken.

    Attributes:
        obs: ``[.., N, O]`` float32, each agent's local observation.
        state: ``[.., D]`` float32, the global state, for centralised training only.
        avail_actions: ``[.., N, A]`` bool, True where an action is allowed.
    """

    obs: Array
    state: Array
    avail_actions: Array


class StepOutcome(NamedTuple):
    """The results of one environment step in addition to the next state.

    Attributes:
        reward: ``[..]`` float32, shared by all agents.
        terminated: ``[..]`` bool, the task itself ended: nothing is bootstrapped from the next state.
        truncated: ``[..]`` bool, the episode was cut by its time limit: the next state's value still counts.
    """

    reward: Array
    terminated: Array
    truncated: Array


class Moment(NamedTuple):
    """A state of an episode, and the step that led to it.

    Attributes:
        env_state: the state.
        episode_return: the undiscounted return so far.
        before: the previous state, None at the start; then there are no actions either.
        joint_action: ``[N]`` int32.
        key: the key of the step.
    """

    env_state: PyTree
    episode_return: float
    before: PyTree | None = None
    joint_action: Array | None = None
    key: PRNGKey | None = None


class Episode(NamedTuple):
    """Padded whole episodes; everything past an episode's end is zero.

    A row holds one episode, or several, one after another. Each has one place more than it has steps, for the
    observation after its last step, so that there is a masked step between two episodes.

    Attributes:
        obs: ``[.., T+1, N, O]`` float32.
        state: ``[.., T+1, D]`` float32.
        avail_actions: ``[.., T+1, N, A]`` bool.
        joint_action: ``[.., T, N]`` int32.
        reward: ``[.., T]`` float32.
        discount: ``[.., T]`` float32, 0 where the task terminated, 1 elsewhere (an end by the time limit included).
        mask: ``[.., T]`` float32, 1 for a real step.
        starts: ``[.., T+1]`` bool, where an episode begins; None where each row is one episode.
        num_places: scalar int32, the number of places after which every row is empty; None if unknown.
        importance: ``[.., T]`` float32, the weight of a step in a loss, where episodes aren't drawn uniformly; None
            where they are.
        compact: a function that makes ``obs`` of its arguments, leaves ``[.., T+1, ..]``: an unroll on an accelerator
            slices the arguments, so that only the observations of some steps exist at a time. None if there is none. A
            loss that changes ``obs`` before an unroll must set it to None.
        latent: the latent of the episode at each place, leaves ``[.., T+1, ..]``, see
            `wqmix_jax.algos.base.Algorithm.draw_latent`; ``()`` if there is none.
    """

    obs: Array
    state: Array
    avail_actions: Array
    joint_action: Array
    reward: Array
    discount: Array
    mask: Array
    starts: Array | None = None
    num_places: Array | None = None
    importance: Array | None = None
    compact: jax.tree_util.Partial | None = None
    latent: PyTree = ()


class StoredEpisode(NamedTuple):
    """An episode as a rollout records it and the replay stores it, in an environment's compact form.

    Attributes:
        steps: the compact environment states, leaves ``[.., T+1, ..]``; zero past the end.
        joint_action: ``[.., T, N]`` in the narrowest unsigned integer.
        reward: ``[.., T]`` float32.
        length: ``[..]`` int32, the number of real steps.
        terminated: ``[..]`` bool, whether the task ended after the last of them.
        latent: the latent of the episode, leaves ``[.., ..]``; ``()`` if there is none.
    """

    steps: PyTree
    joint_action: Array
    reward: Array
    length: Array
    terminated: Array
    latent: PyTree = ()
