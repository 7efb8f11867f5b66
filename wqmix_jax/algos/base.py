"""The contract of an algorithm: options, and pure functions of parameters.

A new algorithm is one subclass of `Algorithm` (or of a family that exists) in one file and one yaml in
``configs/algo``. The learner owns what every algorithm needs once: the optimiser, the target copies, schedules and
counters.
"""

import abc
import collections
import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import pydantic
from pydantic import Field

from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree

TRACED = "traced"
"""Marks an option that the compiled loop takes as a traced scalar, so that changing it doesn't recompile."""

Fraction = Annotated[float, Field(ge=0, le=1), TRACED]
PositiveFraction = Annotated[float, Field(gt=0, le=1), TRACED]
PositiveFloat = Annotated[float, Field(gt=0), TRACED]

Hyperparams = Any
"""A NamedTuple of the traced options' values, named as the options are."""


class AgentInputs(NamedTuple):
    """What the agents may see when they act.

    Attributes:
        obs: ``[.., N, O]`` float32.
        last_action: ``[.., N]`` int32, -1 at the first step.
        avail_actions: ``[.., N, A]`` bool.
    """

    obs: Array
    last_action: Array
    avail_actions: Array


class Context(NamedTuple):
    """Where training stands.

    Attributes:
        epsilon: scalar, the exploration of this episode; 0 in evaluation.
        env_steps: scalar int32.
        learner_steps: scalar int32.
    """

    epsilon: Array
    env_steps: Array
    learner_steps: Array


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
        metrics: scalars for the log.
        values: the intermediate arrays, by their names in the glossary; compiled away where nobody reads them.
    """

    metrics: dict[str, Array]
    values: dict[str, Array]


@options
class Algorithm(abc.ABC):
    """Options and pure functions that every algorithm has; the defaults are in ``configs/algo/_base.yaml``.

    Attributes:
        gamma: discount factor.
        lr: learning rate of RMSProp.
        rms_decay: decay of RMSProp's mean square.
        rms_eps: added to the root mean square (outside the square root).
        max_grad_norm: joint clip of the gradient's global norm.
        batch_size: episodes per learner step.
        buffer_size: episodes kept in the replay.
        target_update_interval: episodes between two hard copies of the target nets.
        epsilon_start: exploration at the start.
        epsilon_finish: exploration after ``epsilon_anneal_steps``.
        epsilon_anneal_steps: environment steps of the linear anneal.
        hidden_dim: width of the recurrent agent.
    """

    gamma: Fraction
    lr: PositiveFloat
    rms_decay: Fraction
    rms_eps: PositiveFloat
    max_grad_norm: PositiveFloat
    batch_size: PositiveInt
    buffer_size: PositiveInt
    target_update_interval: Annotated[int, Field(gt=0, lt=2**31), TRACED]
    epsilon_start: Fraction
    epsilon_finish: Fraction
    epsilon_anneal_steps: Annotated[int, Field(gt=0, lt=2**31), TRACED]
    hidden_dim: PositiveInt

    @pydantic.model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.buffer_size < self.batch_size:
            raise ValueError(
                f"algo.buffer_size={self.buffer_size} is not allowed: "
                f"at least algo.batch_size={self.batch_size} is needed"
            )
        return self

    def without_effect(self) -> dict[str, str]:
        """Options that nothing depends on, each with the value of another that makes it so; none by default."""
        return {}

    @abc.abstractmethod
    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the online parameters; the target's start as a copy."""

    @abc.abstractmethod
    def initial_carry(self, batch_shape: tuple[int, ...]) -> PyTree:
        """The recurrent state at the start of an episode, for ``batch_shape = (.., N)``."""

    @abc.abstractmethod
    def act(
        self, params: PyTree, carry: PyTree, inputs: AgentInputs, hp: Hyperparams, ctx: Context, key: PRNGKey
    ) -> tuple[Array, PyTree]:
        """Chooses the joint action ``[.., N]`` int32 from local inputs alone, and moves the recurrent state on."""

    def acting_params(self, params: PyTree) -> PyTree:
        """The part of the parameters that `act` reads, which is all that playing needs; everything by default."""
        return params

    def sample_noise(self, key: PRNGKey, batch: Episode) -> PyTree:
        """Everything random that `loss` uses, leaves ``[B, T, ..]`` or ``[B, T+1, ..]``; nothing by default.

        Only shapes and dtypes may be read of ``batch``: noise is drawn for whole episodes, cut or packed as they are.
        """
        del key, batch
        return ()

    @abc.abstractmethod
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """The scalar loss of ``batch`` (rows of episodes, ``[B, T, ..]``), summed over everything that is trained."""


Loss = TypeVar("Loss", bound=Callable[..., tuple[Array, Aux]])


def mean_over_steps(loss: Loss) -> Loss:
    """Marks an `Algorithm.loss` that is a mean over the batch's real steps, all its metrics too.

    Its gradient on a batch is then that on the batch's parts, averaged by their steps, so that devices may share a
    batch, and short episodes a row of it: what such a loss carries from step to step has to begin anew where
    `Episode.starts` says so, as `QLearner.unroll` does, and may end after `Episode.num_places`, a scalar without the
    axis of rows.
    The mark is the function's own: a subclass with a loss of another kind has none. What overrides a part of a marked
    loss (an `unroll`, targets that look several steps ahead) keeps to this too, or the loss is overridden, unmarked.
    """
    vars(loss)["is_mean_over_steps"] = True
    return loss


def is_mean_over_steps(algo: Algorithm) -> bool:
    """Whether the algorithm's loss is marked by `mean_over_steps`."""
    return getattr(type(algo).loss, "is_mean_over_steps", False)


def hyperparams(algo: Algorithm) -> Hyperparams:
    """The options marked `TRACED`, as a NamedTuple of Python scalars (a pytree)."""
    hints = typing.get_type_hints(type(algo), include_extras=True)
    names = tuple(
        field.name for field in dataclasses.fields(algo) if TRACED in getattr(hints[field.name], "__metadata__", ())
    )
    return _hyperparams_type(names)(*(getattr(algo, name) for name in names))


@functools.cache
def _hyperparams_type(names: tuple[str, ...]) -> type:
    """One type per set of names, so that two runs' values are the same kind of pytree."""
    return collections.namedtuple("Hyperparams", names)
