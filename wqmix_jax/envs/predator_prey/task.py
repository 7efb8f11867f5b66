"""The paper's predator-prey task as pure functions (appendix B.1 of Rashid et al. 2020; Böhmer et al. 2020).

The rules are those of ``src/envs/stag_hunt.py`` in the authors' released code: predators move one by one in a random
order; then each prey, also in a random order, is caught or flees. A step's randomness is an explicit `Noise`, so a
recorded step can be replayed exactly. Positions are ``(row, column)``; row 0 is the top.

In shapes, ``N`` is the number of agents, ``P`` the number of prey, ``r`` the `obs_radius`, and ``H`` and ``W`` are the
rows and columns of the grid. A cell's index counts the cells row by row.
"""

import functools
from typing import Annotated, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from wqmix_jax.envs.base import Environment
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome

RIGHT, DOWN, LEFT, UP, STAY, CATCH = range(6)
NUM_ACTIONS = 6
NUM_CHANNELS = 3
"""Features of one cell: agents, stags, hares."""
WORD_BITS = 32
"""Bits of the words in which `_ones_at` collects features."""

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
        _, _, missed = self._hunt(moved, joint_action == CATCH, noise)
        return jnp.zeros_like(missed).at[noise.prey_order].set(missed)  # `missed` is in the order of turns

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
        return CompressedState(cells=self._cell(positions).astype(narrowest), flags=jnp.packbits(flags))

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
        # A sum over the four moves rather than a look-up: any other number, even one out of range, moves no agent.
        chosen_move = joint_action[:, None] == jnp.array([RIGHT, DOWN, LEFT, UP], joint_action.dtype)[None]
        offset = jnp.where(chosen_move[:, :, None], _moves()[None], 0).sum(1, dtype=jnp.int32)
        goal = self._inside(start + offset)
        # Each agent moves once, so whether a goal is taken depends only on who has moved before. Both answers for each
        # pair are computed in advance, [N, N]: is agent j on i's goal if j is still at its start, or at its own goal?
        # Only the choice between the two is left for the sequential scan, whose state is one bit for each agent.
        on_grid = self._on_grid(env_state.agents_active)[None]
        taken_if_stayed = _same_cell(goal, start) & on_grid
        taken_if_moved = _same_cell(goal, goal) & on_grid
        # Standing still is a "move" onto the agent's own cell, which it takes itself: it changes nothing.
        prey_there = (_same_cell(goal, env_state.prey_pos) & env_state.prey_alive[None]).any(1)
        may_move = env_state.agents_active & ~prey_there

        def turn(has_moved: Array, agent: Array) -> tuple[Array, None]:
            taken = jnp.where(has_moved, taken_if_moved[agent], taken_if_stayed[agent]).any()
            moves = may_move[agent] & ~taken
            return has_moved | (moves & (_index(self.num_agents) == agent)), None  # one-hot: cheaper than a scatter

        has_moved, _ = jax.lax.scan(turn, jnp.zeros(self.num_agents, bool), order)
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
            The state, the reward (float32 scalar), and ``[P]`` bool in the order of turns, True where a catch failed.
        """
        agents, prey = env_state.agents_pos, env_state.prey_pos
        # Agents no longer move, so everything that depends on their positions is computed in advance for all prey.
        adjacent_catcher = _adjacent(prey, agents) & is_catching[None]  # [P, N]
        # At a wall the goal is the prey's own cell, which counts as taken by itself: a prey stays only if shut in.
        goal_cells = self._cell(self._inside(prey[:, None] + _moves()[None]))  # [P, 4]
        agent_there = goal_cells[:, :, None] == self._cell(agents)[None, None]  # [P, 4, N]
        is_stag = _index(self.num_prey) < self.num_stags
        needed = jnp.where(is_stag, jnp.int32(self.stag_catchers), jnp.int32(self.hare_catchers))
        gain = jnp.where(is_stag, jnp.float32(self.reward_stag), jnp.float32(self.reward_hare))

        def turn(
            carry: tuple[Array, Array, Array], prey_index: Array
        ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
            cells, alive, active = carry
            me = _index(self.num_prey) == prey_index  # one-hot, so that updates are selections and not scatters
            catchers = adjacent_catcher[prey_index] & active  # without those frozen earlier in this step
            count = catchers.sum(dtype=jnp.int32)
            caught = alive[prey_index] & (count >= needed[prey_index])
            missed = alive[prey_index] & (count > 0) & ~caught
            alive = alive & ~(me & caught)
            if self.capture_freezes:
                active = active & ~(catchers & caught)
            # The flight: a cell is free if neither an agent on the grid nor a living prey is there. A dead prey gets a
            # choice, too, but doesn't take it.
            cell = goal_cells[prey_index]
            agent_blocks = (agent_there[prey_index] & self._on_grid(active)[None]).any(-1)
            prey_blocks = ((cell[:, None] == cells[None]) & alive[None]).any(-1)
            choice = _choose(cell, ~agent_blocks & ~prey_blocks, noise.prey_uniform[prey_index])
            flees = me & alive & (choice >= 0)
            cells = jnp.where(flees, choice, cells)
            reward = jnp.where(caught, gain[prey_index], jnp.where(missed, jnp.float32(self.punishment), 0.0))
            return (cells, alive, active), (reward, missed)

        start = (self._cell(prey), env_state.prey_alive, env_state.agents_active)
        (cells, alive, active), (rewards, missed) = jax.lax.scan(turn, start, noise.prey_order)
        hunted = env_state._replace(prey_pos=self._position(cells), prey_alive=alive, agents_active=active)
        return hunted, rewards.sum(dtype=jnp.float32), missed

    def _local_views(self, env_state: EnvState) -> Array:
        """Returns the window around each agent, ``[N, (2r+1)^2 * 3]`` float32."""
        width = 2 * self.obs_radius + 1
        # No window is cut out of the grid: each of the N + P others is placed in each window by its offset.
        everyone = jnp.concatenate([env_state.agents_pos, env_state.prey_pos])
        visible = jnp.concatenate([env_state.agents_active, env_state.prey_alive])
        in_window = everyone[None] - env_state.agents_pos[:, None] + self.obs_radius  # [N, N + P, 2]
        seen = ((in_window >= 0) & (in_window < width)).all(-1) & visible[None]
        seen &= self._on_grid(env_state.agents_active)[:, None]  # an agent that has left the grid sees nothing
        feature = (in_window[..., 0] * width + in_window[..., 1]) * NUM_CHANNELS + self._channels()[None]
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
        can_move = (self._inside(goals) == goals).all(-1) | self.toroidal  # `_inside` changes what is outside the grid
        apart = jnp.abs(start[:, None] - env_state.prey_pos[None])
        if self.toroidal:
            apart = jnp.minimum(apart, jnp.array(self.world_shape, jnp.int32)[None, None] - apart)
        can_catch = ((apart.sum(-1) == 1) & env_state.prey_alive[None]).any(-1, keepdims=True)
        can_stay = jnp.ones((self.num_agents, 1), bool)
        avail = jnp.concatenate([can_move, can_stay, can_catch], axis=-1)
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
    return jnp.array([(0, 1), (1, 0), (0, -1), (-1, 0)], jnp.int32)


def _random_order(key: PRNGKey, size: int) -> Array:
    """Draws a uniform permutation as the ranks of random words: cheaper than a sort in a batch of few entities."""
    word = jax.random.bits(key, (size,), jnp.uint32)
    index = _index(size)
    # Equal words are ranked by index, so that the ranks are a permutation in any case.
    ahead = (word[None] < word[:, None]) | ((word[None] == word[:, None]) & (index[None] < index[:, None]))
    return ahead.sum(1, dtype=jnp.int32)


def _same_cell(positions: Array, others: Array) -> Array:
    """Returns ``[I, J]`` bool for positions ``[I, 2]`` and ``[J, 2]``."""
    return (positions[:, None] == others[None]).all(-1)


def _adjacent(positions: Array, others: Array) -> Array:
    """Returns ``[I, J]`` bool: True at a Manhattan distance of one cell, which never reaches across the edge."""
    return jnp.abs(positions[:, None] - others[None]).sum(-1) == 1


def _choose(cells: Array, possible: Array, uniform: Array) -> Array:
    """Returns the ``floor(uniform * n)``-th of the ``n`` possible cells among ``cells`` (``[M]``); -1 if none is."""
    index = _index(len(cells))
    earlier = (possible[None] & (index[None] < index[:, None])).sum(1, dtype=jnp.int32)
    wanted = jnp.floor(uniform * possible.sum(dtype=jnp.float32)).astype(jnp.int32)
    return jnp.where(possible & (earlier == wanted), cells, -1).max()


def _ones_at(features: Array, size: int) -> Array:
    """Returns ``[.., size]`` float32 with ones at ``features`` (``[.., J]``); -1 is nowhere."""
    forms = {"cpu": _ones_by_word, "default": _ones_by_place}
    return jax.lax.platform_dependent(features, **{name: functools.partial(form, size) for name, form in forms.items()})


def _ones_by_place(size: int, features: Array) -> Array:
    """Compares every feature with every place: on an accelerator, one kernel without an array of words."""
    places = jnp.arange(size, dtype=features.dtype).reshape((1,) * features.ndim + (-1,))
    return (features[..., None] == places).any(-2).astype(jnp.float32)


def _ones_by_word(size: int, features: Array) -> Array:
    """Collects the ones as bits of words first.

    On a CPU, comparing every feature with every place would take a sixth of a learner step for a replayed batch.
    """
    word, bit = jnp.divmod(features, WORD_BITS)  # -1 is in word -1
    # [.., J, words]: each feature as a bit in its word; then the words of all J features are joined.
    index = _index(-(-size // WORD_BITS)).reshape((1,) * features.ndim + (-1,))
    ones = jnp.where(word[..., None] == index, jnp.uint32(1) << bit.astype(jnp.uint32)[..., None], jnp.uint32(0))
    words = jax.lax.reduce(ones, jnp.uint32(0), jax.lax.bitwise_or, (features.ndim - 1,))
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32).reshape((1,) * features.ndim + (-1,))
    bits = (words[..., None] >> shifts) & jnp.uint32(1)
    return bits.reshape(*features.shape[:-1], -1)[..., :size].astype(jnp.float32)
