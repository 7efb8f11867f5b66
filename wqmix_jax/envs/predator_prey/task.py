"""The paper's predator-prey task as pure functions (appendix B.1 of Rashid et al. 2020; Böhmer et al. 2020).

The rules are those of ``src/envs/stag_hunt.py`` in the authors' released code: predators move one by one in a random
order; then each prey, also in a random order, is caught or flees. A step's randomness is an explicit `Noise`, so a
recorded step can be replayed exactly. Positions are ``(row, column)``; row 0 is the top.

In shapes, ``N`` is the number of agents, ``P`` the number of prey, ``r`` the `obs_radius`, and ``H`` and ``W`` are the
rows and columns of the grid. A cell's index counts the cells row by row.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from wqmix_jax.envs.base import Environment
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome

RIGHT, DOWN, LEFT, UP, STAY, CATCH = range(6)
NUM_ACTIONS = 6
MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""The offsets that `RIGHT`, `DOWN`, `LEFT` and `UP` add to a position."""
NUM_CHANNELS = 3
"""Features of one cell: agents, stags, hares."""
WORD_BITS = 32
"""Bits of the words in which `_bits` collects flags, and `_ones_by_word` features."""
EVERY_FOURTH = np.uint32(0x11111111)
"""The word in which the lowest of every four bits is set."""
MAX_UNROLLED = 8
"""The most turns that are compiled as straight-line code; more of them run in a loop."""

NonNegativeInt = Annotated[int, Field(ge=0)]


class EnvState(NamedTuple):
    """The positions and who is still in the game.

    Attributes:
        agents_pos: ``[N, 2]`` int32 (row, column); for a removed agent the cell that it left.
        prey_pos: ``[P, 2]`` int32, stags first, then hares; for a dead prey the cell where it was caught.
        prey_alive: ``[P]`` bool.
        agents_active: ``[N]`` bool, False once frozen.
        steps: int32 scalar, steps played.
    """

    agents_pos: Array
    prey_pos: Array
    prey_alive: Array
    agents_active: Array
    steps: Array


class Noise(NamedTuple):
    """All randomness of one step.

    Attributes:
        agent_order: ``[N]`` int32, the agents in the order in which they move.
        prey_order: ``[P]`` int32, the prey in the order of their turns.
        prey_uniform: ``[P]`` float32 in [0, 1): prey ``p`` takes ``possible[floor(u[p] * len(possible))]`` of its free
            cells in the order right, down, left, up.
    """

    agent_order: Array
    prey_order: Array
    prey_uniform: Array


Words = tuple[Array, ...]
"""Flags of agents or prey as the bits of ``ceil(N / 32)`` arrays of uint32."""


class _Move(NamedTuple):
    """The inputs of one agent's turn to move; words have a bit for each agent.

    Attributes:
        me: the agent's own bit.
        may_move: bool, False if it is frozen or a prey is on its goal.
        taken_if_stayed: the agents whose starts are its goal.
        taken_if_moved: the agents whose goals are its goal.
    """

    me: Words
    may_move: Array
    taken_if_stayed: Words
    taken_if_moved: Words


class _PreyTurn(NamedTuple):
    """The inputs of one prey's turn, as words of the flags in `_Hunt`.

    Attributes:
        here: of ``flags``, whether this prey is on its cell.
        missed: of ``flags``, whether the catch of this prey failed.
        catchers: of ``flags``, whether each adjacent agent that plays `CATCH` is active.
        bodies_there: ``[4]``, of ``flags``, whether those who are on the goals of its moves still are.
        moves: of ``moves``, its own four.
        moves_there: ``[4]``, of ``moves``, those that end on the goals of its moves.
        needed: int32, how many catchers it takes.
        uniform: float32, see `Noise`.
    """

    here: Words
    missed: Words
    catchers: Words
    bodies_there: Words
    moves: Words
    moves_there: Words
    needed: Array
    uniform: Array


class _Hunt(NamedTuple):
    """The state between two turns of prey; in all flags, prey are in the order of their turns.

    Attributes:
        flags: words of one flag for each agent, True while it is on the grid; one for each prey, True while it lives on
            the cell where it was; one for each prey, True if its catch failed; and one for each agent, True while it is
            active, unless that is the same as being on the grid.
        moves: words of four flags for each prey, True for the move that it has made.
    """

    flags: Words
    moves: Words


class CompressedState(NamedTuple):
    """One step in the replay.

    Attributes:
        cells: ``[N + P]``, the index of each agent's and prey's cell in the narrowest unsigned dtype.
        flags: ``[ceil((N + P) / 8)]`` uint8, one bit each: is this agent active, is this prey alive.
    """

    cells: Array
    flags: Array


@options
class PredatorPrey(Environment):
    """Predators that must gather around their prey: a catch by too few agents is punished.

    Attributes:
        world_shape: rows and columns of the grid, in cells.
        toroidal: whether agents step over the edge to the other side, and `catch` is available across it. A catch
            itself never reaches across the edge, nor does a view.
        num_agents: predators.
        num_stags: prey that need `stag_catchers`.
        num_hares: prey that need `hare_catchers`.
        obs_radius: how many cells an agent sees to each side; 2 is a window of 5 x 5 cells.
        punishment: reward, at most 0, for each prey and step with an adjacent catcher but too few of them.
        stag_catchers: agents that must catch a stag in the same step.
        hare_catchers: agents that must catch a hare in the same step.
        reward_stag: team reward for a caught stag.
        reward_hare: team reward for a caught hare.
        capture_freezes: whether the catchers of a caught prey no longer act in the rest of the episode.
        remove_frozen: whether they also leave the grid, and so no longer block cells.
        episode_limit: steps after which an episode is cut.
    """

    world_shape: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
    toroidal: bool
    num_agents: PositiveInt
    num_stags: NonNegativeInt
    num_hares: NonNegativeInt
    obs_radius: NonNegativeInt
    punishment: Annotated[float, Field(le=0)]
    stag_catchers: PositiveInt
    hare_catchers: PositiveInt
    reward_stag: float
    reward_hare: float
    capture_freezes: bool
    remove_frozen: bool
    episode_limit: Annotated[int, Field(gt=0, lt=2**31)]

    viewer_class: ClassVar[str | None] = "wqmix_jax.envs.predator_prey.viewer:PredatorPreyViewer"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        rows, columns = self.world_shape
        entities = self.num_agents + self.num_prey
        if self.num_prey == 0:
            raise ValueError("num_stags=0 and num_hares=0 are not allowed together: at least one prey is needed")
        if entities > rows * columns:
            raise ValueError(
                f"world_shape={self.world_shape} is not allowed: its {rows * columns} cells must hold "
                f"num_agents + num_stags + num_hares = {entities}, one to a cell"
            )
        for prey in ("stag", "hare"):
            catchers = getattr(self, f"{prey}_catchers")
            if getattr(self, f"num_{prey}s") and catchers > self.num_agents:
                at_most = f"at most num_agents={self.num_agents} can catch a {prey}"
                raise ValueError(f"{prey}_catchers={catchers} is not allowed: {at_most}")
        return self

    @property
    def num_prey(self) -> int:
        """``P``, stags and hares."""
        return self.num_stags + self.num_hares

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`."""
        rows, columns = self.world_shape
        return EnvSpec(
            num_agents=self.num_agents,
            num_actions=NUM_ACTIONS,
            obs_dim=(2 * self.obs_radius + 1) ** 2 * NUM_CHANNELS,
            state_dim=rows * columns * NUM_CHANNELS,
            episode_limit=self.episode_limit,
        )

    def reset(self, key: PRNGKey) -> EnvState:
        """Places every agent and prey on a different cell, all placements equally likely."""
        rows, columns = self.world_shape
        cells = jax.random.permutation(key, jnp.arange(rows * columns, dtype=jnp.int32))
        positions = self._position(cells[: self.num_agents + self.num_prey])
        return EnvState(
            agents_pos=positions[: self.num_agents],
            prey_pos=positions[self.num_agents :],
            prey_alive=jnp.ones(self.num_prey, bool),
            agents_active=jnp.ones(self.num_agents, bool),
            steps=jnp.zeros((), jnp.int32),
        )

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays one step with fresh noise. All actions are accepted: one that isn't possible does nothing."""
        return self.transition(env_state, joint_action, self.sample_noise(key))

    def sample_noise(self, key: PRNGKey) -> Noise:
        """Draws the noise of one `transition`; both orders are uniform over permutations."""
        agent_key, prey_key, move_key = jax.random.split(key, 3)
        return Noise(
            agent_order=_random_order(agent_key, self.num_agents),
            prey_order=_random_order(prey_key, self.num_prey),
            prey_uniform=jax.random.uniform(move_key, (self.num_prey,), jnp.float32),
        )

    def transition(self, env_state: EnvState, joint_action: Array, noise: Noise) -> tuple[EnvState, StepOutcome]:
        """Plays one step without randomness: agents move, then each prey is caught or flees.

        Args:
            env_state: see `EnvState`.
            joint_action: ``[N]`` integers.
            noise: see `Noise`.

        Returns:
            The next state and its outcome. An end at the time limit is `truncated`, even if the task ended there too.
        """
        moved = self._move_agents(env_state, joint_action, noise.agent_order)
        hunted, reward, _ = self._hunt(moved, joint_action == CATCH, noise)
        next_state = hunted._replace(steps=env_state.steps + jnp.int32(1))
        ended = ~next_state.prey_alive.any() | ~next_state.agents_active.any()
        truncated = next_state.steps >= self.episode_limit
        return next_state, StepOutcome(reward=reward, terminated=ended & ~truncated, truncated=truncated)

    def miscaptures(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> Array:
        """Returns ``[P]`` bool, True for the prey for which a `step` with the same arguments is punished."""
        noise = self.sample_noise(key)
        moved = self._move_agents(env_state, joint_action, noise.agent_order)
        return self._hunt(moved, joint_action == CATCH, noise)[2]

    def observe(self, env_state: EnvState) -> Observation:
        """Returns local windows, the whole grid and the allowed actions of ``env_state``.

        Returns:
            obs ``[N, (2r+1)^2 * 3]``, the window centred on each agent; the agent itself is shown, frozen agents are
            hidden, cells outside the grid are zeros. state ``[H * W * 3]``; avail_actions ``[N, 6]``. The features of
            both are ordered by rows, then columns, then channels.
        """
        return Observation(
            obs=self._local_views(env_state),
            state=self._global_view(env_state),
            avail_actions=self._avail_actions(env_state),
        )

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Returns ``captures``, the number of prey caught in the episode."""
        return {"captures": (~env_state.prey_alive).sum(dtype=jnp.float32)}

    def compress(self, env_state: EnvState) -> CompressedState:
        """Returns cell indices and flags, 18 bytes in the paper's task; `observe` reads nothing else."""
        rows, columns = self.world_shape
        narrowest = next(d for d in (jnp.uint8, jnp.uint16, jnp.uint32) if rows * columns - 1 <= jnp.iinfo(d).max)
        positions = jnp.concatenate([env_state.agents_pos, env_state.prey_pos])
        flags = jnp.concatenate([env_state.agents_active, env_state.prey_alive])
        return CompressedState(cells=self._cell(positions).astype(narrowest), flags=_packed(flags))

    def decompress(self, compressed: CompressedState) -> Observation:
        """Recomputes the `Observation` of the compressed state."""
        positions = self._position(compressed.cells.astype(jnp.int32))
        flags = jnp.unpackbits(compressed.flags, count=self.num_agents + self.num_prey).astype(bool)
        return self.observe(
            EnvState(
                agents_pos=positions[: self.num_agents],
                prey_pos=positions[self.num_agents :],
                prey_alive=flags[self.num_agents :],
                agents_active=flags[: self.num_agents],
                steps=jnp.zeros((), jnp.int32),  # no observation shows the number of steps
            )
        )

    def _move_agents(self, env_state: EnvState, joint_action: Array, order: Array) -> EnvState:
        """Moves one agent after another; a move is cancelled if its goal is taken when the agent's turn comes.

        Args:
            env_state: see `EnvState`.
            joint_action: ``[N]`` integers.
            order: ``[N]`` int32, see `Noise`.
        """
        start = env_state.agents_pos
        goal = self._inside(start + _offset(*(joint_action == move for move in (RIGHT, DOWN, LEFT, UP))))
        # Each agent moves once, so whether a goal is taken depends only on who has moved before. Both answers for each
        # pair are computed in advance: is agent j on i's goal if j is still at its start, or at its own goal? Only the
        # choice between the two is left for the turns. Flags of all j are bits of words: then a turn is a few integer
        # operations, and all turns together are one kernel on a GPU.
        on_grid = self._on_grid(env_state.agents_active)[:, None]
        starts, goals, prey = self._cell(start), self._cell(goal), self._cell(env_state.prey_pos)
        their_goals = goals[order]
        # Standing still is a "move" onto the agent's own cell, which it takes itself: it changes nothing.
        prey_there = ((prey[:, None] == their_goals[None]) & env_state.prey_alive[:, None]).any(0)
        turns = _Move(
            me=_bits(_index(self.num_agents)[:, None] == order[None]),
            may_move=env_state.agents_active[order] & ~prey_there,
            taken_if_stayed=_bits((starts[:, None] == their_goals[None]) & on_grid),
            taken_if_moved=_bits((goals[:, None] == their_goals[None]) & on_grid),
        )

        def turn(moved: Words, at: _Move) -> tuple[Words, None]:
            moves = at.may_move & ~_meet(at.taken_if_moved, moved) & ~_meet(at.taken_if_stayed, _others(moved))
            return _with(moved, at.me, moves), None

        has_moved = _flags(_play_turns(turn, _nothing(self.num_agents), turns), self.num_agents)
        return env_state._replace(agents_pos=jnp.where(has_moved[:, None], goal, start))

    def _hunt(self, env_state: EnvState, is_catching: Array, noise: Noise) -> tuple[EnvState, Array, Array]:
        """Lets one prey after another be caught or flee, each fully before the next.

        A prey with enough adjacent catchers dies and pays its reward; with some but too few it costs `punishment`. A
        prey that lives then flees to a random free neighbouring cell. Catchers that are frozen by one capture are
        not counted for a later prey, and where frozen agents leave the grid, their cells are free for it.

        Args:
            env_state: the state after the agents' moves.
            is_catching: ``[N]`` bool, who plays `CATCH`.
            noise: see `Noise`.

        Returns:
            The state, the reward (float32 scalar), and ``[P]`` bool, True where a catch failed.
        """
        agents, prey, order = env_state.agents_pos, env_state.prey_pos, noise.prey_order
        prey_in_turn, alive, is_stag = prey[order], env_state.prey_alive[order], order < self.num_stags
        # Agents no longer move, and each prey moves at most once, so everything that depends on positions is computed
        # in advance; see `_move_agents`. At a wall the goal is the prey's own cell, which counts as taken by itself: a
        # prey stays only if shut in.
        goals = self._goals(prey_in_turn)
        bodies = self._cell(jnp.concatenate([agents, prey_in_turn]))
        num_agents, num_prey, num_flags = self.num_agents, self.num_prey, self._num_hunt_flags()
        at_prey, at_missed, at_active = num_agents, num_agents + num_prey, num_flags - num_agents
        if self.remove_frozen:
            at_active = 0
        turns = _PreyTurn(
            here=_bits(_each(num_prey), num_flags, at_prey),
            missed=_bits(_each(num_prey), num_flags, at_missed),
            catchers=_bits(_adjacent(agents, prey_in_turn) & is_catching[:, None], num_flags, at_active),
            bodies_there=_bits(bodies[:, None, None] == goals[None], num_flags),
            moves=_bits(jnp.repeat(_each(num_prey), len(MOVES), axis=0)),
            moves_there=_bits(goals.reshape(-1)[:, None, None] == goals[None]),
            needed=jnp.where(is_stag, jnp.int32(self.stag_catchers), jnp.int32(self.hare_catchers)),
            uniform=noise.prey_uniform[order],
        )
        active = env_state.agents_active
        flags = [self._on_grid(active), alive, jnp.zeros_like(alive), *([] if self.remove_frozen else [active])]
        start = _Hunt(_bits(jnp.concatenate(flags)), _nothing(len(MOVES) * num_prey))
        hunted = _play_turns(self._prey_turn, start, turns)
        moves = _flags(hunted.moves, len(MOVES) * num_prey).reshape(-1, len(MOVES))
        flags = _flags(hunted.flags, num_flags)
        survives = flags[at_prey : at_prey + num_prey] | moves[:, 0] | moves[:, 1] | moves[:, 2] | moves[:, 3]
        missed = flags[at_missed : at_missed + num_prey]
        gain = jnp.where(is_stag, self.reward_stag, self.reward_hare)
        rewards = jnp.where(alive & ~survives, gain, jnp.where(missed, self.punishment, 0.0)).astype(jnp.float32)
        by_prey = functools.partial(_by_index, order)
        next_state = env_state._replace(
            prey_pos=self._inside(prey + _offset(*(by_prey(moves[:, move]) for move in range(len(MOVES))))),
            prey_alive=by_prey(survives),
            agents_active=flags[at_active : at_active + num_agents],
        )
        return next_state, rewards.sum(dtype=jnp.float32), by_prey(missed)

    def _num_hunt_flags(self) -> int:
        return self.num_agents + 2 * self.num_prey + (0 if self.remove_frozen else self.num_agents)

    def _prey_turn(self, hunt: _Hunt, at: _PreyTurn) -> tuple[_Hunt, None]:
        """Lets one prey be caught or flee."""
        flags, moves = hunt
        catchers = _common(at.catchers, flags)  # without those frozen earlier in this step
        count = sum((jax.lax.population_count(word).astype(jnp.int32) for word in catchers), jnp.int32(0))
        is_alive = _meet(flags, at.here)  # it can't have moved before its turn
        caught = is_alive & (count >= at.needed)
        # The flight: a cell is free if neither an agent on the grid nor a living prey is there.
        free = []
        for move in range(len(MOVES)):
            bodies_there, moves_there = (
                tuple(word[move] for word in words) for words in (at.bodies_there, at.moves_there)
            )
            free.append(~_meet(bodies_there, flags) & ~_meet(moves_there, moves))
        move = jnp.where(is_alive & ~caught, _choose(free, at.uniform), jnp.uint32(0))
        if self.capture_freezes:
            flags = _without(flags, catchers, caught)
        flags = _without(flags, at.here, caught | (move != 0))
        flags = _with(flags, at.missed, is_alive & (count > 0) & ~caught)
        return _Hunt(
            flags, tuple(w | (mine & (move * EVERY_FOURTH)) for w, mine in zip(moves, at.moves, strict=True))
        ), None

    def _local_views(self, env_state: EnvState) -> Array:
        """Returns the window around each agent, ``[N, (2r+1)^2 * 3]`` float32."""
        width = 2 * self.obs_radius + 1
        # No window is cut out of the grid: each of the N + P others is placed in each window by its offset.
        everyone = jnp.concatenate([env_state.agents_pos, env_state.prey_pos])
        visible = jnp.concatenate([env_state.agents_active, env_state.prey_alive])
        corner = env_state.agents_pos - self.obs_radius
        # Rows and columns in the window, [N, N + P].
        row, column = (everyone[None, :, axis] - corner[:, axis, None] for axis in range(2))
        seen = (row >= 0) & (row < width) & (column >= 0) & (column < width) & visible[None]
        seen &= self._on_grid(env_state.agents_active)[:, None]  # an agent that has left the grid sees nothing
        feature = (row * width + column) * NUM_CHANNELS + self._channels()[None]
        return _ones_at(jnp.where(seen, feature, -1), width * width * NUM_CHANNELS)

    def _global_view(self, env_state: EnvState) -> Array:
        """Returns the whole grid, ``[H * W * 3]`` float32."""
        rows, columns = self.world_shape
        cells = self._cell(jnp.concatenate([env_state.agents_pos, env_state.prey_pos]))
        visible = jnp.concatenate([self._on_grid(env_state.agents_active), env_state.prey_alive])
        feature = cells * NUM_CHANNELS + self._channels()
        return _ones_at(jnp.where(visible, feature, -1), rows * columns * NUM_CHANNELS)

    def _avail_actions(self, env_state: EnvState) -> Array:
        """Returns ``[N, 6]`` bool: moves that end on the grid, even on a taken cell; stay; catch next to a living prey.

        A frozen agent can only stay.
        """
        start = env_state.agents_pos
        goals = start[:, None] + _moves()[None]
        same = self._inside(goals) == goals  # `_inside` changes what is outside the grid
        can_move = (same[..., 0] & same[..., 1]) | self.toroidal
        apart = jnp.abs(env_state.prey_pos[:, None] - start[None])
        if self.toroidal:
            apart = jnp.minimum(apart, jnp.array(self.world_shape, jnp.int32)[None, None] - apart)
        can_catch = ((apart[..., 0] + apart[..., 1] == 1) & env_state.prey_alive[:, None]).any(0)
        can_stay = jnp.ones((self.num_agents, 1), bool)
        avail = jnp.concatenate([can_move, can_stay, can_catch[:, None]], axis=-1)
        return jnp.where(env_state.agents_active[:, None], avail, (_index(NUM_ACTIONS) == STAY)[None])

    def _channels(self) -> Array:
        """Returns ``[N + P]`` int32, the feature of a cell that shows each agent and prey."""
        return jnp.array([0] * self.num_agents + [1] * self.num_stags + [2] * self.num_hares, jnp.int32)

    def _on_grid(self, agents_active: Array) -> Array:
        """Returns ``[N]`` bool, True for agents on the grid: frozen ones leave it only with `remove_frozen`."""
        return agents_active if self.remove_frozen else jnp.ones_like(agents_active)

    def _inside(self, positions: Array) -> Array:
        """Wraps or clips positions up to one step outside the grid back onto it."""
        shape = jnp.array(self.world_shape, jnp.int32)[(None,) * (positions.ndim - 1)]
        return positions % shape if self.toroidal else jnp.clip(positions, 0, shape - 1)

    def _goals(self, positions: Array) -> Array:
        """Returns the indices of the cells where each of the four moves ends: ``[.., 2]`` -> ``[.., 4]`` int32."""
        # A CPU computes the elements of a stack once, and those of a sum with `_moves` again for each comparison.
        (row, column), (rows, columns) = (positions[..., 0], positions[..., 1]), self.world_shape
        ends = [(row + down, column + right) for down, right in MOVES]
        row, column = (jnp.stack(each, axis=-1) for each in zip(*ends, strict=True))
        if self.toroidal:
            return row % rows * columns + column % columns
        return jnp.clip(row, 0, rows - 1) * columns + jnp.clip(column, 0, columns - 1)

    def _cell(self, positions: Array) -> Array:
        """Returns the indices of cells, ``[..]`` int32, row by row, from positions ``[.., 2]``."""
        return positions[..., 0] * self.world_shape[1] + positions[..., 1]

    def _position(self, cells: Array) -> Array:
        """The inverse of `_cell`."""
        return jnp.stack(jnp.divmod(cells, self.world_shape[1]), axis=-1)


def _index(size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)


def _moves() -> Array:
    """Returns ``[4, 2]`` int32, the offsets that `RIGHT`, `DOWN`, `LEFT` and `UP` add to a position."""
    return jnp.array(MOVES, jnp.int32)


def _random_order(key: PRNGKey, size: int) -> Array:
    """Draws a uniform permutation as the ranks of random words: cheaper than a sort in a batch of few entities."""
    word = jax.random.bits(key, (size,), jnp.uint32)
    index = _index(size)
    # Equal words are ranked by index, so that the ranks are a permutation in any case.
    ahead = (word[None] < word[:, None]) | ((word[None] == word[:, None]) & (index[None] < index[:, None]))
    return ahead.sum(1, dtype=jnp.int32)


def _offset(right: Array, down: Array, left: Array, up: Array) -> Array:
    """Returns the offset of at most one move, ``[.., 2]`` int32, from flags ``[..]``."""
    right, down, left, up = (flag.astype(jnp.int32) for flag in (right, down, left, up))
    return jnp.stack([down - up, right - left], axis=-1)


def _adjacent(positions: Array, others: Array) -> Array:
    """Returns ``[I, J]`` bool: True at a Manhattan distance of one cell, which never reaches across the edge."""
    apart = jnp.abs(positions[:, None] - others[None])
    return apart[..., 0] + apart[..., 1] == 1


def _choose(possible: list[Array], uniform: Array) -> Array:
    """Returns the ``floor(uniform * n)``-th of the ``n`` possible choices as one bit of a word, 0 if there is none."""
    bits = [jnp.where(flag, jnp.uint32(1 << index), jnp.uint32(0)) for index, flag in enumerate(possible)]
    left = functools.reduce(jnp.bitwise_or, bits)
    wanted = jnp.floor(uniform * jax.lax.population_count(left).astype(jnp.float32)).astype(jnp.int32)
    for index in range(1, len(possible)):  # n - 1 bits at most come before the wanted one
        left = jnp.where(wanted >= index, left & (left - 1), left)  # clears the lowest bit
    return left & -left


def _play_turns(turn: Callable[[Any, Any], tuple[Any, None]], start: Any, turns: Any) -> Any:
    """Returns the state, words, after the turns, leaves ``[I, ..]``, one after another.

    As straight-line code, which is one kernel on a GPU, where a loop has some for each turn. A CPU runs them in parts:
    the border between two makes it compute the words once, and not again for each element of what is made of them.
    """

    def play(unroll: int, start: Any, turns: Any) -> Any:
        return jax.lax.scan(turn, start, turns, unroll=unroll)[0]

    straight = min(len(jax.tree.leaves(turns)[0]), MAX_UNROLLED)
    cpu, default = (functools.partial(play, max(1, unroll)) for unroll in (straight // 2, straight))
    words = jax.lax.platform_dependent(start, jax.lax.optimization_barrier(turns), cpu=cpu, default=default)
    # The barrier does this elsewhere. The words are rows of one array, chosen by an elementwise selection: XLA would
    # compute each row of a concatenation with everything that it depends on, in exponential time.
    leaves, tree = jax.tree.flatten(words)
    row = jnp.arange(len(leaves))
    rows = functools.reduce(lambda so_far, at: jnp.where(row == at[0], at[1], so_far), enumerate(leaves), leaves[0])
    rows = jax.lax.optimization_barrier(jnp.broadcast_to(rows, row.shape))
    return jax.tree.unflatten(tree, list(rows))


def _bits(flags: Array, size: int | None = None, first: int = 0) -> Words:
    """Collects flags in the bits of words, ``[J, ..]`` bool -> ``[..]``: those from ``first`` on of ``size`` flags."""
    # The first axis and not the last: a GPU computes a sum over the last axis in a kernel that nothing else shares. And
    # several arrays rather than an axis of words: what has no axes at all is computed once in a kernel, however often
    # it is used there.
    bits = range(first, first + len(flags))
    words = []
    for word in range(_num_words(size or len(flags))):
        part = [index for index, bit in enumerate(bits) if bit // WORD_BITS == word]
        shifts = np.array([bits[index] % WORD_BITS for index in part], np.uint32)
        ones = flags[part[0] : part[-1] + 1] if part else flags[:0]
        ones = ones.astype(jnp.uint32) << shifts.reshape(-1, *[1] * (flags.ndim - 1))
        words.append(ones.sum(0, dtype=jnp.uint32))
    return tuple(words)


def _flags(words: Words, size: int) -> Array:
    """The inverse of `_bits` for scalar words: ``[size]`` bool."""
    index = jnp.arange(size, dtype=jnp.uint32)
    parts = [
        word >> index[start : start + WORD_BITS] % WORD_BITS
        for word, start in zip(words, range(0, size, WORD_BITS), strict=True)
    ]
    return (jnp.concatenate(parts) & 1).astype(bool)


def _each(size: int) -> Array:
    return jnp.eye(size, dtype=bool)


def _in_turn(order: Array, leaf: Array) -> Array:
    """Returns the entries ``[I, ..]`` in the order of turns ``[I]``; as sums, in which few entries cost no gather."""
    there = _index(len(order))[:, None] == order[None]
    there = there.reshape(*there.shape, *[1] * (leaf.ndim - 1))
    return jnp.where(there, leaf[:, None], jnp.zeros_like(leaf[:, None])).sum(0, dtype=leaf.dtype)


def _by_index(order: Array, leaf: Array) -> Array:
    """The inverse of `_in_turn` for flags ``[I]``."""
    return ((order[:, None] == _index(len(order))[None]) & leaf[:, None]).any(0)


def _nothing(size: int) -> Words:
    return tuple(jnp.uint32(0) for _ in range(_num_words(size)))


def _num_words(size: int) -> int:
    return -(-size // WORD_BITS)


def _common(words: Words, others: Words) -> Words:
    return tuple(word & other for word, other in zip(words, others, strict=True))


def _meet(words: Words, others: Words) -> Array:
    """Returns True if a flag is set in both."""
    return functools.reduce(jnp.bitwise_or, _common(words, others)) != 0


def _with(words: Words, more: Words, condition: Array) -> Words:
    """Returns the words with the flags of ``more`` set, too, where the condition is true."""
    return tuple(jnp.where(condition, word | bits, word) for word, bits in zip(words, more, strict=True))


def _without(words: Words, fewer: Words, condition: Array) -> Words:
    """Returns the words with the flags of ``fewer`` cleared where the condition is true."""
    return tuple(jnp.where(condition, word & ~bits, word) for word, bits in zip(words, fewer, strict=True))


def _others(words: Words) -> Words:
    """Returns the flags that aren't set, those without an owner included."""
    return tuple(~word for word in words)


def _packed(flags: Array) -> Array:
    """Returns `jnp.packbits` of ``[J]`` bool, as elementwise operations, which a GPU needs no separate kernel for."""
    flags = jnp.pad(flags, (0, -len(flags) % 8)).astype(jnp.uint8)
    return functools.reduce(jnp.bitwise_or, (flags[bit::8] << (7 - bit) for bit in range(8)))


def _ones_at(features: Array, size: int) -> Array:
    """Returns ``[.., size]`` float32 with ones at ``features`` (``[.., J]``); -1 is nowhere."""
    by_word, by_place = (functools.partial(ones, size=size) for ones in (_ones_by_word, _ones_by_place))
    return jax.lax.platform_dependent(features, cpu=by_word, default=by_place)


def _ones_by_place(features: Array, size: int) -> Array:
    """Compares every feature with every place; on a GPU or TPU, this needs no array larger than its result."""
    places = _index(size).reshape((1,) * features.ndim + (-1,))
    return (features[..., None] == places).any(-2).astype(jnp.float32)


def _ones_by_word(features: Array, size: int) -> Array:
    """Collects the ones as bits of words first; comparing would take a sixth of a learner step on a CPU."""
    word, bit = jnp.divmod(features, WORD_BITS)  # -1 is in word -1
    # [.., J, words]: each feature as a bit in its word; then the words of all J features are joined.
    index = _index(-(-size // WORD_BITS)).reshape((1,) * features.ndim + (-1,))
    ones = jnp.where(word[..., None] == index, jnp.uint32(1) << bit.astype(jnp.uint32)[..., None], jnp.uint32(0))
    words = jax.lax.reduce(ones, jnp.uint32(0), jax.lax.bitwise_or, (features.ndim - 1,))
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * features.ndim + (-1,))
    bits = (words[..., None] >> shifts) & jnp.uint32(1)
    return bits.reshape(*features.shape[:-1], -1)[..., :size].astype(jnp.float32)
