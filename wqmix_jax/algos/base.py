"""The contract of an algorithm: options, and pure functions of parameters.

A new algorithm is one subclass of `Algorithm` (or of an existing family) in one file and one yaml in
``configs/algo``. ``training/learner.py`` has the optimiser and the target copies, ``training/compiled_loop.py`` the
epsilon schedule and the counters, once for all algorithms.
"""

import abc
import collections
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import pydantic
from pydantic import Field

from wqmix_jax.ops.randomness import defines_last
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree

TRACED = "traced"
"""Marks an option that the compiled loop takes as a traced scalar, so that changing it doesn't recompile."""

Fraction = Annotated[float, Field(ge=0, le=1), TRACED]
"""The type of a traced option in [0, 1]."""

PositiveFraction = Annotated[float, Field(gt=0, le=1), TRACED]
"""The type of a traced option in (0, 1]."""

PositiveFloat = Annotated[float, Field(gt=0), TRACED]
"""The type of a traced option above 0."""

Weight = Annotated[float, Field(ge=0), TRACED]
"""The type of a traced option of at least 0."""

DecayRate = Annotated[float, Field(ge=0, lt=1)]
"""The type of an option in [0, 1), by which a running mean forgets older steps."""

Hyperparams = Any
"""A NamedTuple of the traced options' values, named as the options are."""


class AgentInputs(NamedTuple):
    """The observations of agents when they act.

    Attributes:
        obs: ``[.., N, O]`` float32.
        last_action: ``[.., N]`` int32, -1 at the first step.
        avail_actions: ``[.., N, A]`` bool.
        latent: the latent of the episode, leaves ``[.., ..]`` without an axis of agents; ``()`` unless the algorithm
            draws one, see `Algorithm.draw_latent`.
        state: ``[.., D]`` float32; ``()`` unless `Algorithm.acts_on_state`, and where a saved policy acts by itself.
    """

    obs: Array
    last_action: Array
    avail_actions: Array
    latent: PyTree = ()
    state: PyTree = ()


class Context(NamedTuple):
    """The progress of training.

    Attributes:
        epsilon: scalar, the exploration of this episode; 0 in evaluation.
        env_steps: scalar int32.
        learner_steps: scalar int32.
    """

    epsilon: Array
    env_steps: Array
    learner_steps: Array


class Aux(NamedTuple):
    """The results of a loss in addition to its value.

    Attributes:
        metrics: scalars for the records. ``loss``, the loss itself, must be among them: a run looks for divergence in
            it.
        values: intermediate arrays by name, for subclasses and tests; compiled away if unused.
    """

    metrics: dict[str, Array]
    values: dict[str, Array]


class Trained(NamedTuple):
    """The part of a seed's learner that optimiser steps change.

    Attributes:
        params: the online parameters.
        opt_state: the optimiser's state, or, if `Algorithm.optimizers` names several, the state of each by name.
    """

    params: PyTree
    opt_state: PyTree


class OptimizerStep(Protocol):
    """One step of an optimiser, see `Algorithm.update`."""

    def __call__(
        self, trained: Trained, grads: PyTree, name: str | None = None, *, lr: Array | None = None, clips: bool = True
    ) -> tuple[Trained, Array]:
        """Clips the gradients by their joint norm and takes the step.

        Args:
            trained: the parameters and the optimisers' states before it.
            grads: the gradients of the optimiser's nets; those of other nets are left out, also of the norm.
            name: a key of `Algorithm.optimizers`; None if that is empty.
            lr: the learning rate; ``hp.lr`` if absent.
            clips: whether gradients are clipped at ``hp.max_grad_norm``.

        Returns:
            ``trained`` after it, and the norm before clipping.
        """
        ...


@options
class Algorithm(abc.ABC):
    """Options and pure functions that every algorithm has; the defaults are in ``configs/algo/_base.yaml``.

    Attributes:
        gamma: discount factor.
        reward_scale: factor of the rewards that a learner sees; records have the environment's.
        standardise_rewards: whether a learner sees rewards minus their mean, divided by their standard deviation, both
            over all steps replayed so far; then ``reward_scale`` has no effect.
        lr: learning rate.
        lr_schedule: ``constant``, or ``linear`` or ``cosine``: from ``lr`` at the start to 0 at ``total_env_steps``.
        optimizer: ``rmsprop``, ``adam``, ``adamw`` or ``radam``, with torch's conventions, except that ``radam`` adds
            epsilon after the correction of the bias, as optax does.
        rms_decay: decay of RMSProp's mean square.
        rms_eps: added to RMSProp's root mean square (outside the square root).
        adam_b1: decay of the mean gradient of Adam, AdamW and RAdam.
        adam_b2: decay of their mean square.
        adam_eps: added to their root mean square (outside the square root).
        weight_decay: factor of the parameters that is added to the clipped gradients; with ``adamw``, to the step.
        max_grad_norm: joint clip of the gradient's global norm.
        batch_size: episodes per learner step.
        buffer_size: episodes kept in the replay.
        target_update_interval: episodes between two hard copies of the target nets.
        target_update_tau: tau of soft updates, ``target = (1 - tau) target + tau online`` after every learner step;
            ``null``: hard copies.
        epsilon_start: exploration at the start.
        epsilon_finish: exploration after ``epsilon_anneal_steps``.
        epsilon_anneal_steps: environment steps of the linear anneal.
        hidden_dim: width of the recurrent agent.
    """

    gamma: Fraction
    reward_scale: Annotated[float, Field(gt=0)]
    standardise_rewards: bool
    lr: PositiveFloat
    lr_schedule: Literal["constant", "linear", "cosine"]
    optimizer: Literal["rmsprop", "adam", "adamw", "radam"]
    rms_decay: Fraction
    rms_eps: PositiveFloat
    adam_b1: DecayRate
    adam_b2: DecayRate
    adam_eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: PositiveFloat
    batch_size: PositiveInt
    buffer_size: PositiveInt
    target_update_interval: Annotated[int, Field(gt=0, lt=2**31), TRACED]
    target_update_tau: Annotated[Annotated[float, Field(gt=0, le=1)] | None, TRACED]
    epsilon_start: Fraction
    epsilon_finish: Fraction
    epsilon_anneal_steps: Annotated[int, Field(gt=0, lt=2**31), TRACED]
    hidden_dim: PositiveInt

    is_on_policy: ClassVar[bool] = False
    """True if the batches of an iteration are the episodes just played, and no others.

    The replay then holds the ``num_envs`` episodes of one iteration. They are split at random into disjoint batches,
    once in each pass over them, and ``updates_per_iteration`` are that many passes. Such a class inherits the yaml
    ``/_run/on_policy``.
    """

    target_has_played: ClassVar[bool] = False
    """True if `loss` gets, as ``target``, the parameters that played the episodes just played.

    They are copied once, before the first learner step of an iteration, instead of at the usual intervals. What is
    standardised then changes at this time alone; `played_means` is called. Needs `is_on_policy`.
    """

    clips_nets_apart: ClassVar[bool] = False
    """True if ``max_grad_norm`` bounds the gradient of each entry of the parameters, not that of all together."""

    @pydantic.model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.buffer_size < self.batch_size:
            raise ValueError(
                f"algo.buffer_size={self.buffer_size} is not allowed: "
                f"at least algo.batch_size={self.batch_size} is needed"
            )
        return self

    acts_on_state: ClassVar[bool] = False
    """True if `act` gets the state where whole episodes are played; `GreedyPolicy.act` of a saved policy has none."""

    def without_effect(self) -> dict[str, str]:
        """Maps each option that has no effect to the setting that disables it."""
        unused = ["adam_b1", "adam_b2", "adam_eps"] if self.optimizer == "rmsprop" else ["rms_decay", "rms_eps"]
        without: dict[str, str] = dict.fromkeys(unused, f"algo.optimizer={self.optimizer}")
        if self.standardise_rewards:
            without |= {"reward_scale": "algo.standardise_rewards=true"}
        if self.target_has_played:
            reason = "an algorithm whose targets are the parameters that played"
            without |= dict.fromkeys(["target_update_interval", "target_update_tau"], reason)
        elif self.target_update_tau is not None:
            without |= {"target_update_interval": f"algo.target_update_tau={self.target_update_tau}"}
        return without

    @abc.abstractmethod
    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the online parameters; the target's start as a copy."""

    @abc.abstractmethod
    def initial_carry(self, batch_shape: tuple[int, ...]) -> PyTree:
        """Returns the recurrent state at the start of an episode, for ``batch_shape = (.., N)``."""

    @abc.abstractmethod
    def act(
        self, params: PyTree, carry: PyTree, inputs: AgentInputs, hp: Hyperparams, ctx: Context, key: PRNGKey
    ) -> tuple[Array, PyTree]:
        """Chooses the joint action ``[.., N]`` int32, and updates the recurrent state.

        Each agent acts on its own inputs alone, unless the class says that execution is centralised.
        """

    def sample_act_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> PyTree:
        """Draws all random numbers of one `act`; by default they are the key itself, from which `act` draws.

        The trainer draws for many steps in one call, before it plays them: on a GPU or TPU, draws within a step cost
        more time than the nets do. A class that overrides this and `act_with_noise` defines ``act(.., key)`` as
        ``act_with_noise(.., sample_act_noise(key, shape))``. A subclass that overrides `act` alone plays by that `act`.

        Args:
            key: the key of this step and seed.
            shape: ``(.., N, A)``, the shape of `AgentInputs.avail_actions`.
        """
        del shape
        return key

    def act_with_noise(
        self, params: PyTree, carry: PyTree, inputs: AgentInputs, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, PyTree]:
        """Returns what `act` returns, from random numbers that `sample_act_noise` has drawn."""
        return self.act(params, carry, inputs, hp, ctx, noise)

    def draw_latent(self, params: PyTree, state: Array, hp: Hyperparams, ctx: Context, key: PRNGKey) -> PyTree:
        """Draws the latent of each episode at its start, leaves ``[.., ..]``; ``()``, no latent, by default.

        All agents get the same latent at all steps of the episode, as `AgentInputs.latent`. The replay stores it with
        the episode, and `loss` gets it as `Episode.latent`, so narrow dtypes save memory.

        Args:
            params: see `acting_params`.
            state: ``[.., D]``, the first state of each episode.
            hp: the traced options by name.
            ctx: the progress of training; epsilon is 0 in evaluation.
            key: random key of all these episodes.
        """
        del params, state, hp, ctx, key
        return ()

    def acting_params(self, params: PyTree) -> PyTree:
        """Returns the parameters that `act` and `draw_latent` read, all that playing needs; everything by default."""
        return params

    def sample_noise(self, key: PRNGKey, batch: Episode) -> PyTree:
        """Draws all random numbers that `loss` uses, leaves ``[B, T, ..]`` or ``[B, T+1, ..]``; nothing by default.

        Only the shapes and dtypes of ``batch`` may be read. The trainer later cuts or packs the noise in the same way
        as the episodes.
        """
        del key, batch
        return ()

    def played_means(self, target: PyTree, batch: Episode, hp: Hyperparams) -> Aux:
        """Returns means over the episodes just played that `loss` reads as ``hp.NAME``; none by default.

        Called if `target_has_played`, before the first learner step of an iteration, for parts of the episodes as
        `loss` is.

        Args:
            target: the parameters that played.
            batch: see `loss`.
            hp: see `loss`.

        Returns:
            In `Aux.metrics`, means over the real steps of ``batch`` by name. An algorithm that standardises returns
            adds their mean as ``td_target_mean``, and in `Aux.values` themselves as ``td_target``; `loss` then reads
            the moments before and after these were added, ``hp.played_return_mean`` and ``hp.return_mean`` with their
            deviations.
        """
        del target, batch, hp
        return Aux({}, {})

    @abc.abstractmethod
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the scalar loss of one seed's batch, the sum over all trained parts, and an `Aux`.

        Args:
            params: the online parameters, as `init` returns them.
            target: the target copy of all of them.
            batch: rows of one or several episodes, ``[B, T(+1), ..]``. ``starts`` marks where one begins (None: one per
                row), ``num_places`` bounds the unroll.
            hp: the traced options by name.
            ctx: the progress of training of this seed.
            noise: what `sample_noise` drew; ``()`` by default.
        """

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """Maps a name of each of several optimisers to the nets, keys of the parameters, that it trains.

        Empty by default: one optimiser trains all nets. All are of the kind that ``optimizer`` says. With several,
        `update` must be overridden.
        """
        return {}

    def update(
        self,
        trained: Trained,
        target: PyTree,
        batch: Episode,
        hp: Hyperparams,
        ctx: Context,
        noise: PyTree,
        step: OptimizerStep,
    ) -> tuple[Trained, Aux]:
        """Takes the optimiser steps of one learner call on one seed's batch: by default one, on the gradient of `loss`.

        An override may take several steps, on some of the nets or on all. It gets whole batches, one row per episode,
        which are neither packed nor shared by devices. The default has the same result as the trainer's, which
        therefore calls an override alone.

        Args:
            trained: the online parameters, and the state of the optimisers.
            target: see `loss`, as all but the first and the last argument.
            batch: see `loss`.
            hp: see `loss`.
            ctx: see `loss`; ``learner_steps`` counts learner calls.
            noise: see `loss`.
            step: takes one step of an optimiser.

        Returns:
            ``trained`` after all steps, and an `Aux` as `loss` returns it, with the metric ``grad_norm``.
        """
        grads, aux = jax.grad(self.loss, has_aux=True)(trained.params, target, batch, hp, ctx, noise)
        trained, grad_norm = step(trained, grads)
        return trained, aux._replace(metrics=aux.metrics | {"grad_norm": grad_norm})


Loss = TypeVar("Loss", bound=Callable[..., tuple[PyTree, Aux]])


def draws_latent(algo: Algorithm) -> bool:
    """Returns True if the algorithm draws a latent for each episode."""
    return type(algo).draw_latent is not Algorithm.draw_latent


def latent_template(algo: Algorithm, env_spec: EnvSpec) -> PyTree:
    """Returns the shapes and dtypes of the latent of one episode; ``()`` if the algorithm draws none."""
    if not draws_latent(algo):
        return ()

    def draw() -> PyTree:
        key = jax.random.key(0, impl="threefry2x32")
        params, hp = algo.acting_params(algo.init(key, env_spec)), jax.tree.map(jnp.asarray, hyperparams(algo))
        ctx = Context(epsilon=jnp.float32(0), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
        return algo.draw_latent(params, jnp.zeros(env_spec.state_dim), hp, ctx, key)

    return jax.eval_shape(draw)


def mean_over_steps(loss: Loss) -> Loss:
    """Marks an `Algorithm.loss` that is a mean over the batch's real steps, all its metrics too; or an `update`.

    Its gradient on a batch is then the average of the gradients on parts of the batch, weighted by their steps. So
    devices may share a batch, and short episodes a row. Such a loss must restart its recurrent state where
    `Episode.starts` is true, as `QLearner.unroll` does, and may stop after `Episode.num_places`, a scalar without the
    axis of rows. An override of a part of a marked loss (an `unroll`, targets that look several steps ahead) must keep
    to this too; otherwise override the loss, unmarked.

    An `Algorithm.update` is marked if all losses in it are such means, and may stop after `Episode.num_places`, too.
    Its batches are never packed or shared.
    """
    # A mark on the function and not an attribute of the class: a subclass that overrides the loss loses the mark, and
    # learns slowly but correctly until its author marks the new one. An inherited attribute could be silently wrong.
    vars(loss)["is_mean_over_steps"] = True
    return loss


def mean_over_steps_where(condition: Callable[[Any], bool]) -> Callable[[Loss], Loss]:
    """Marks a loss as `mean_over_steps` does, for algorithms alone whose options fulfil the condition."""

    def mark(loss: Loss) -> Loss:
        vars(loss)["is_mean_over_steps"] = condition
        return loss

    return mark


def is_mean_over_steps(algo: Algorithm) -> bool:
    """Returns True if the algorithm's single step is on the gradient of a loss marked by `mean_over_steps`."""
    return not takes_own_steps(algo) and skips_padding(algo)


def skips_padding(algo: Algorithm) -> bool:
    """Returns True if the function that learns, `loss` or an overridden `update`, is marked by `mean_over_steps`.

    Or by `mean_over_steps_where`, for the options of ``algo``.
    """
    learns = type(algo).update if takes_own_steps(algo) else type(algo).loss
    mark: Any = getattr(learns, "is_mean_over_steps", False)
    return bool(mark(algo) if callable(mark) else mark)


def takes_own_steps(algo: Algorithm) -> bool:
    """Returns True if the algorithm overrides `Algorithm.update`."""
    return type(algo).update is not Algorithm.update


class Acting(NamedTuple):
    """An algorithm's choices of actions, for the trainer: all random numbers first, then the choice without any.

    Attributes:
        sample_noise: as `Algorithm.sample_act_noise`.
        act: as `Algorithm.act_with_noise`.
        sees_state: `Algorithm.acts_on_state`.
    """

    sample_noise: Callable[[PRNGKey, tuple[int, ...]], PyTree]
    act: Callable[[PyTree, PyTree, AgentInputs, Hyperparams, Context, PyTree], tuple[Array, PyTree]]
    sees_state: bool


def acting_of(algo: Algorithm) -> Acting:
    """Returns how ``algo`` acts by what its class defines last, `act_with_noise` or `act`; see `sample_act_noise`."""
    if defines_last(type(algo), "act_with_noise", over=("act",)):
        return Acting(algo.sample_act_noise, algo.act_with_noise, algo.acts_on_state)
    return Acting(lambda key, shape: key, algo.act, algo.acts_on_state)


def hyperparams(algo: Algorithm) -> Hyperparams:
    """Returns the options marked `TRACED` that aren't None, as a NamedTuple of Python scalars (a pytree)."""
    # Losses read ``hp.lr``, a traced scalar, and never ``self.lr``, a constant of the program: one compiled program
    # then runs all values of a sweep, and members of one call may differ in them.
    # The mark is in the annotation (`Fraction`, `PositiveFloat`), so a new option can't be traced by accident.
    hints = typing.get_type_hints(type(algo), include_extras=True)
    marked = (
        field.name for field in dataclasses.fields(algo) if TRACED in getattr(hints[field.name], "__metadata__", ())
    )
    values = {name: value for name in marked if (value := getattr(algo, name)) is not None}
    return _hyperparams_type(tuple(values))(**values)


def with_values(hp: Hyperparams, values: Mapping[str, Array]) -> Hyperparams:
    """Adds values that a loss reads by their names like options: ``return_mean``, for example."""
    return _hyperparams_type((*hp._fields, *values))(*hp, *values.values())


@functools.cache
def _hyperparams_type(names: tuple[str, ...]) -> type:
    """Returns one type per set of names, so that two runs' values are the same kind of pytree."""
    return collections.namedtuple("Hyperparams", names)
