"""Policies for playing: the parameters that acting needs, in one ``.npz`` file, and how greedy agents use them."""

import contextlib
import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.algos.base import AgentInputs, Algorithm, Context, draws_latent, hyperparams, latent_template
from wqmix_jax.envs.base import Environment
from wqmix_jax.errors import ConfigError
from wqmix_jax.networks.functional import compute_in
from wqmix_jax.ops.action_selection import with_idle_action
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.records.atomic import atomic
from wqmix_jax.training.devices import jax_precision
from wqmix_jax.training.members import Member, labels_of
from wqmix_jax.types import Array, EnvSpec, Moment, PRNGKey, PyTree

POLICY_DIR, BEST, LAST = "policies", "best", "last"


class Policy(NamedTuple):
    """The acting parameters of every member of a run; numpy leaves ``[S, ..]``.

    Attributes:
        params: the result of `Algorithm.acting_params`.
        env_steps: environment steps at each member's evaluation, int32 ``[S]``; 0 for nets that have not learned yet.
        episode_return: each member's mean evaluation return, float32 ``[S]``; -inf if there was no evaluation.
    """

    params: PyTree
    env_steps: np.ndarray
    episode_return: np.ndarray


def no_policy(params: PyTree) -> Policy:
    """Returns zeros of the shapes of ``params`` as a policy that is worse than any other."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    num_members = len(jax.tree.leaves(zeros)[0])
    return Policy(zeros, np.zeros(num_members, np.int32), np.full(num_members, -np.inf, np.float32))


def better(one: Policy, other: Policy) -> Policy:
    """Chooses each member's better policy: the one with the higher return, but a trained one before an untrained one.

    Args:
        one: the best policies so far; they are kept where returns are equal.
        other: new policies; the return of a member that has none is nan.
    """
    untrained, evaluated = (one.env_steps == 0) & (other.env_steps > 0), ~np.isnan(other.episode_return)
    wins = (other.episode_return > one.episode_return) | (untrained & evaluated)

    def choose(old: np.ndarray, new: Any) -> np.ndarray:
        return np.where(wins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, one, other) if wins.any() else one


def save_policy(path: Path, policy: Policy, members: Sequence[Member]) -> None:
    """Writes leaves by their paths (``params.agent.encoder.kernel``) and the members' labels, see `atomic`."""
    path.parent.mkdir(exist_ok=True)
    named = {name: np.array([member.labels[name] for member in members]) for name in members[0].labels}
    with atomic(path) as temporary:
        np.savez(temporary, **named, **flat(policy))


def policy_file(run_dir: Path, which: str) -> Path:
    """Returns the file of a run's policies.

    Args:
        run_dir: the run's folder.
        which: ``best`` or ``last``.

    Raises:
        ConfigError: if there is none.
    """
    path = run_dir / POLICY_DIR / f"{which}.npz"
    if not path.is_file():
        written = "a run writes its policies with its checkpoints, and the policies of a merged run are in its parts"
        raise ConfigError(f"{path} is not there: {written}")
    return path


def read_policies(path: Path, params: PyTree) -> Policy:
    """Reads a file of policies.

    Args:
        path: the file.
        params: shapes and dtypes of one member's parameters.

    Returns:
        The policies of all members, leaves ``[S, ..]``.

    Raises:
        ConfigError: if it can't be read or has other shapes.
    """
    leaves = read_arrays(path)
    like = Policy(params, np.int32(0), np.float32(0))  # type: ignore[arg-type]
    num_members = {len(leaves[name]) if leaves[name].ndim else 0 for name in leaves}
    if len(num_members) != 1 or num_members == {0}:
        raise ConfigError(f"{path} is damaged: its arrays are of {sorted(num_members)} members")
    for name, leaf in flat(like).items():
        wanted, found = f"{leaf.dtype}{list(leaf.shape)}", "absent"
        if name in leaves:
            found = f"{leaves[name].dtype}{list(leaves[name].shape[1:])}"
        if found != wanted:
            raise ConfigError(f"{path} doesn't fit: {name} is {found} there, {wanted} here")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat(like)])


def read_labels(path: Path) -> list[dict[str, Any]]:
    """Reads the labels of a file's members (`Member.labels`), in their order.

    Raises:
        ConfigError: if it can't be read or has none.
    """
    labels = {name: values.tolist() for name, values in read_arrays(path).items() if labels_of({name: None})}
    if "seed" not in labels or len({len(values) for values in labels.values()}) != 1:
        raise ConfigError(f"{path} is damaged: it doesn't say whose policies it holds")
    return [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a file; nothing is unpickled.

    Raises:
        ConfigError: if it can't be read.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:  # numpy leaves a path open
            found = dict(arrays)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise ConfigError(f"{path} can't be read: it holds no policies, or is damaged") from None
    if not all(isinstance(values, np.ndarray) for values in found.values()):
        raise ConfigError(f"{path} can't be read: it holds no policies, or is damaged")
    return found


def finite_members(params: PyTree) -> np.ndarray:
    """Returns True for members whose parameters are all finite: leaves ``[S, ..]`` -> bool ``[S]``."""
    finite = [np.isfinite(leaf).reshape(len(leaf), -1).all(-1) for leaf in jax.tree.leaves(params)]
    return np.array(np.stack(finite).all(0))


def flat(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class PolicyCarry(NamedTuple):
    """The agents' memory within an episode.

    Attributes:
        recurrent: the algorithm's recurrent state, leaves ``[.., N, ..]``.
        last_action: ``[.., N]`` int32, -1 before the first action.
        latent: the latent of the episode, see `GreedyPolicy.draw_latent`; ``()`` if the algorithm has none.
    """

    recurrent: PyTree
    last_action: Array
    latent: PyTree = ()


@dataclasses.dataclass(frozen=True)
class GreedyPolicy:
    """The greedy policy of one member; all functions are pure.

    Each agent acts on its own observations, unless the class of ``algo`` says that execution is centralised.

    Attributes:
        algo: the algorithm, with the member's values of swept options.
        params: one member's parameters, as `Algorithm.acting_params` returns them.
        env_spec: the sizes of the environment.
        matmul_precision: precision of products of float32 matrices on an accelerator, an option of the run.
        compute_dtype: the dtype of the matrices that nets multiply.
        env_steps: environment steps that it was trained for, 0 for untrained nets; None if unknown.
    """

    algo: Algorithm
    params: PyTree
    env_spec: EnvSpec
    matmul_precision: str
    compute_dtype: str = "float32"
    env_steps: int | None = None

    def draw_latent(self, state: Array, key: PRNGKey) -> PyTree:
        """Draws what all agents share during an episode, at its start; ``()`` for an algorithm without a latent.

        Args:
            state: ``[.., D]`` float32, the first state of each of ``[..]`` episodes.
            key: a random key.
        """
        hp = jax.tree.map(jnp.asarray, hyperparams(self.algo))
        with self._arithmetic():
            return self.algo.draw_latent(self.params, state, hp, GREEDY, key)

    def initial_carry(self, batch_shape: tuple[int, ...] = (), *, latent: PyTree = ()) -> PolicyCarry:
        """Returns the memory at the start of ``batch_shape`` simultaneous episodes, ``()`` for a single one.

        Args:
            batch_shape: their axes.
            latent: the result of `draw_latent`, or your own choice of the same shapes; needed if the algorithm has one.

        Raises:
            ConfigError: if the latent is missing, or of another shape or dtype.
        """
        shape = (*batch_shape, self.env_spec.num_agents)
        self._check_latent(batch_shape, latent)
        return PolicyCarry(self.algo.initial_carry(shape), jnp.full(shape, -1, jnp.int32), latent)

    def act(self, carry: PolicyCarry, obs: Array, avail_actions: Array) -> tuple[Array, PolicyCarry]:
        """Chooses the greedy action of each agent, 0 for an agent without an available action.

        Args:
            carry: the carry of the previous step, or `initial_carry`.
            obs: ``[.., N, O]`` float32, local observations.
            avail_actions: ``[.., N, A]`` bool, True where an action is allowed.

        Returns:
            The joint action ``[.., N]`` int32 and the next carry.

        Raises:
            AssertionError: if a shape doesn't fit the environment or the carry.
        """
        spec, batch_shape = self.env_spec, carry.last_action.shape[:-1]
        chex.assert_shape(obs, (*batch_shape, spec.num_agents, spec.obs_dim))
        chex.assert_shape(avail_actions, (*batch_shape, spec.num_agents, spec.num_actions))
        hp = jax.tree.map(jnp.asarray, hyperparams(self.algo))
        inputs = AgentInputs(obs, carry.last_action, with_idle_action(avail_actions), carry.latent)
        key = jax.random.key(0, impl="threefry2x32")  # greedy: nothing depends on it
        with self._arithmetic():
            joint_action, recurrent = self.algo.act(self.params, carry.recurrent, inputs, hp, GREEDY, key)
        return joint_action, PolicyCarry(recurrent, joint_action, carry.latent)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Computes as the run did."""
        precision = jax_precision(self.matmul_precision, jax.default_backend())
        with jax.default_matmul_precision(precision), compute_in(self.compute_dtype):
            yield

    def _check_latent(self, batch_shape: tuple[int, ...], latent: PyTree) -> None:
        template = latent_template(self.algo, self.env_spec)
        needed = jax.tree.map(lambda leaf: f"{leaf.dtype}{[*batch_shape, *leaf.shape]}", template)
        found = jax.tree.map(lambda leaf: f"{jnp.asarray(leaf).dtype}{list(jnp.shape(leaf))}", latent)
        if found != needed:
            name = type(self.algo).__name__
            raise ConfigError(
                f"latent={found} is not allowed: {name} needs {needed}, the result of policy.draw_latent(state, key)"
            )


GREEDY = Context(epsilon=np.float32(0), env_steps=np.int32(0), learner_steps=np.int32(0))  # type: ignore[arg-type]
"""The context in which nothing is explored."""


def _first_latent(env: Environment, policy: GreedyPolicy, env_state: Any, key: PRNGKey) -> PyTree:
    """Draws the latent of an episode; the other draws are the same with and without one."""
    if not draws_latent(policy.algo):
        return ()
    latent_key = jax.random.fold_in(key, 2)  # a count after those of the episode's keys
    return jax.jit(lambda state: policy.draw_latent(env.observe(state).state, latent_key))(env_state)


@pinned_draws()
def play_episode(env: Environment, policy: GreedyPolicy, key: PRNGKey) -> list[Moment]:
    """Plays one greedy episode.

    Args:
        env: the environment.
        policy: the policy of all agents.
        key: a key for the randomness of the environment and of the policy's latent.

    Returns:
        The moments of the episode, from the first state to the last: one more than its steps.
    """

    @jax.jit
    def step(env_state: Any, carry: PolicyCarry, key: PRNGKey) -> tuple[Any, ...]:
        seen = env.observe(env_state)
        joint_action, carry = policy.act(carry, seen.obs, seen.avail_actions)
        env_state, outcome = env.step(env_state, joint_action, key)
        return env_state, carry, joint_action, outcome

    reset_key, step_key = jax.random.split(key)
    moments = [Moment(env_state=jax.jit(env.reset)(reset_key), episode_return=0.0)]
    carry = policy.initial_carry(latent=_first_latent(env, policy, moments[0].env_state, key))
    for index in range(env.spec.episode_limit):
        last, key = moments[-1], jax.random.fold_in(step_key, index)
        env_state, carry, joint_action, outcome = step(last.env_state, carry, key)
        episode_return = last.episode_return + float(outcome.reward)
        moments.append(Moment(env_state, episode_return, last.env_state, joint_action, key))
        if outcome.terminated or outcome.truncated:
            break
    return moments
