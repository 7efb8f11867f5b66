"""The loop as a whole, on small nets: what it counts, when it learns, and that company and chunks change nothing."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import TINY, Clock, tiny_dcg, tiny_maddpg, tiny_masac, tiny_ppo, tiny_resq, tiny_run, tiny_wqmix
from tests.training.test_replay import plain_episode, stacked
from wqmix_jax.algos.base import Aux
from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.errors import ConfigError
from wqmix_jax.networks.functional import BlockForm
from wqmix_jax.options import build
from wqmix_jax.training import batch_gradients
from wqmix_jax.training.batch_gradients import BLOCK_FORMS, _static_lengths, make_batching, num_groups
from wqmix_jax.training.compiled_loop import compiler_options, make_trainer, train_sharding
from wqmix_jax.training.devices import seed_sharding
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.row_packing import first_fit_rows

ENV = Clock(episode_limit=4, ends_from=1)
LONG = Clock(episode_limit=32, ends_from=1)  # long enough for batches to be cut or packed
FIVE = {"batch_size": 5, "buffer_size": 5}
BIG_BATCH = {"batch_size": 8, "buffer_size": 12}  # large enough for two devices


def trained(config, seeds, num_chunks, sharding=None, **options):
    """The last state and all records, leaves ``[iterations, S]``."""
    trainer = make_trainer(config, sharding=sharding, **options)
    state, records = trainer.init(seeds), []
    for _ in range(num_chunks):
        state, record = trainer.train_chunk(state)
        records.append(jax.device_get(record))
    return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *records)


def same(one, two, where=slice(None), where_two=None):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    for a, b in leaves:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a[where], b[where if where_two is None else where_two])


def test_steps_are_counted_as_they_happen_and_learning_starts_with_a_full_batch():
    state, records = trained(tiny_run(tiny_wqmix(batch_size=3), ENV), [0], 12)
    lengths = records.episode_length[:, 0]
    assert lengths.min() < 4
    np.testing.assert_array_equal(records.counters.env_steps[:, 0], np.cumsum(lengths))
    np.testing.assert_array_equal(records.counters.episodes[:, 0], np.arange(1, 13))
    np.testing.assert_array_equal(records.updates[:, 0], [0, 0] + [1] * 10)
    np.testing.assert_array_equal(records.counters.learner_steps[:, 0], [0, 0, *range(1, 11)])
    assert int(state.counters.learner_steps[0]) == 10


def test_epsilon_is_that_of_the_episodes_first_step():
    _, records = trained(tiny_run(tiny_wqmix(), ENV), [0], 12)
    before = np.concatenate([[0], records.counters.env_steps[:-1, 0]])
    np.testing.assert_allclose(records.epsilon[:, 0], np.maximum(1.0 - 0.9 * before / 40, 0.1), rtol=1e-5)


def test_a_loss_sees_the_epsilon_of_the_episodes_just_played():
    """As in PyMARL; the steps and the learner steps that it sees are those so far."""
    algo = build("algo", {"_target_": "tests.environments.ContextTeller", **TINY})
    _, records = trained(tiny_run(algo, ENV), [0, 1], 12)
    learnt = records.updates > 0
    assert (np.diff(records.epsilon[:8], axis=0) < 0).all()
    np.testing.assert_array_equal(records.losses["epsilon"][learnt], records.epsilon[learnt])
    np.testing.assert_array_equal(records.losses["env_steps"][learnt], records.counters.env_steps[learnt])
    np.testing.assert_array_equal(records.losses["learner_steps"][learnt], records.counters.learner_steps[learnt] - 1)


def test_epsilon_stays_within_an_episode():
    """Actions show whether epsilon still has its first value: all through episode 0, then never."""
    env = Clock(episode_limit=4, ends_from=4)
    algo = build("algo", {"_target_": "tests.environments.EpsilonTeller", **TINY})
    state, _ = trained(tiny_run(algo, env), [0], 2)
    trainer_rows = state.replay.experience[0, 0, :2]
    from wqmix_jax.training.replay import make_replay

    episodes = make_replay(env, buffer_size=6, batch_size=2).decode(trainer_rows, 4)
    np.testing.assert_array_equal(episodes.joint_action, [np.ones((4, 2)), np.zeros((4, 2))])


def test_targets_are_copied_at_the_authors_episodes():
    """Every 3 episodes, counted before an iteration's own: in iterations 3, 6, 9 when learning started in time."""
    trainer = make_trainer(tiny_run(tiny_wqmix(target_update_interval=3), ENV))
    state, copied = trainer.init([0]), []
    for iteration in range(10):
        state, _ = trainer.train_chunk(state)
        learner = state.learner
        if all(
            bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (learner.params, learner.target)), strict=True)
        ):
            copied.append(iteration)
    assert copied == [0, 3, 6, 9]  # before any learning they are equal, too


@pytest.mark.parametrize("num_envs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_seed_in_company_gives_its_solo_numbers(num_envs):
    config = tiny_run(tiny_wqmix(), ENV, num_envs=num_envs, eval_interval=8)
    together, records = trained(config, [3, 4, 5], 8)
    alone, record = trained(config, [4], 8)
    np.testing.assert_array_equal(records.counters.env_steps[:, 1], record.counters.env_steps[:, 0])
    for many, one in zip(jax.tree.leaves(together.learner), jax.tree.leaves(alone.learner), strict=True):
        np.testing.assert_allclose(many[1], one[0], rtol=2e-4, atol=1e-6)
    assert len({tuple(row) for row in records.episode_length.T}) == 3


def test_seeds_spread_over_devices_give_the_solo_numbers_to_the_bit():
    """A device's shapes are those of a solo run, and so is its program: its branches go by its own seeds alone."""
    config = tiny_run(tiny_wqmix(), ENV, total_env_steps=12)
    together, records = trained(config, [3, 4], 8, seed_sharding(2))
    assert len(together.learner.target_episodes.sharding.device_set) == 2
    for index, seed in enumerate((3, 4)):
        alone, record = trained(config, [seed], 8)
        same(together, alone, index, 0)
        same(records, record, (slice(None), index), (slice(None), 0))
    assert records.active[:, 0].sum() != records.active[:, 1].sum()


@pytest.mark.parametrize(
    ("algo", "env", "total_env_steps"),
    [
        (tiny_wqmix(**BIG_BATCH), ENV, 30),
        pytest.param(tiny_masac(**BIG_BATCH), ENV, 30, marks=pytest.mark.slow),
        pytest.param(tiny_masac(**BIG_BATCH), LONG, 90, marks=pytest.mark.slow),  # its rows are packed
        pytest.param(tiny_ppo(batch_size=8, buffer_size=8), ENV, 60, marks=pytest.mark.slow),
    ],
    ids=["cw_qmix", "masac", "masac packed", "ppo"],
)
def test_devices_that_share_a_batch_give_the_numbers_of_one(algo, env, total_env_steps):
    """To float tolerance: an average over parts is another order of sums. What is drawn is the same."""
    config = tiny_run(algo, env, total_env_steps=total_env_steps, num_envs=8 if algo.is_on_policy else 1)
    sharding = train_sharding(config, 1)
    assert dict(sharding.mesh.shape) == {"seeds": 1, "batch": 2}
    shared, records = trained(config, [3], 16, sharding)
    alone, record = trained(config, [3], 16)
    assert record.updates.sum() >= 2
    assert not record.active[-1, 0]
    for many, one in zip(
        jax.tree.leaves((shared.learner, records)), jax.tree.leaves((alone.learner, record)), strict=True
    ):
        np.testing.assert_allclose(many, one, rtol=2e-4, atol=1e-6)
    for copy in jax.tree.leaves(shared.learner):  # both devices hold the same
        first, second = (shard.data for shard in copy.addressable_shards)
        np.testing.assert_array_equal(first, second)


def test_a_batch_is_shared_only_where_the_loss_is_a_mean_over_its_steps():
    algo = build("algo", {"_target_": "tests.environments.ContextTeller", **TINY, **BIG_BATCH})
    assert len(train_sharding(tiny_run(algo, ENV), 1).device_set) == 1


@pytest.mark.slow
def test_chunk_sizes_never_change_the_numbers():
    runs = [tiny_run(tiny_wqmix(), ENV, eval_interval=24, chunk_iterations=size) for size in (1, 3)]
    (one, one_by_one), (many, by_three) = trained(runs[0], [0, 1], 6), trained(runs[1], [0, 1], 2)
    same(one_by_one, by_three)
    same(one, many)


@pytest.mark.parametrize(
    "seeds", [[0], pytest.param([0, 1], marks=pytest.mark.slow)], ids=["one device", "two devices"]
)
def test_one_program_runs_any_number_of_iterations(seeds):
    """The rows past the last are zeros, and nothing is compiled for another number."""
    config = tiny_run(tiny_wqmix(), ENV, eval_interval=24, chunk_iterations=6)
    trainer = make_trainer(config, sharding=train_sharding(config, len(seeds)))
    whole, expected = trainer.train_chunk(trainer.init(seeds))
    state, rows, sizes = trainer.init(seeds), [], []
    for count in (1, 0, 3, 2):
        state, records = trainer.train(state, np.int32(count))
        rows.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], records))
        assert not any(np.asarray(leaf)[count:].any() for leaf in jax.tree.leaves(records))
        sizes.append(trainer.train._cache_size())
    same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows), expected)
    same(state, whole)
    assert sizes[1] == sizes[-1]  # the state of `init` and that of `train` may count as two kinds of argument


def test_evaluation_changes_nothing_and_draws_from_its_own_keys():
    trainer = make_trainer(tiny_run(tiny_wqmix(), ENV, eval_episodes=5))
    state, other = trainer.init([0]), trainer.init([0])
    for _ in range(4):
        evaluated = trainer.evaluate(state)
        state, record = trainer.train_chunk(state)
        other, plain = trainer.train_chunk(other)
        same(record, plain)
        assert int(evaluated.counters.episodes[0]) == int(record.counters.episodes[0, 0]) - 1
    same(state, other)


def test_a_finished_seed_is_frozen_to_the_bit_while_another_goes_on():
    """Also its replay, moments and keys, and at the same step whether the others are there or not."""
    config = tiny_run(tiny_wqmix(standardise_rewards=True), ENV, total_env_steps=14)
    trainer = make_trainer(config)
    state, frozen = trainer.init([0, 1, 2, 3]), {}
    for _ in range(12):
        before = jax.tree.map(jnp.copy, state)
        done = np.flatnonzero(np.array(before.counters.env_steps) >= 14)
        state, record = trainer.train_chunk(state)
        for seed in done:
            frozen[int(seed)] = True
            same(before, state, where=seed)
            assert not record.active[0, seed]
    assert set(frozen) == {0, 1, 2, 3}
    assert len(set(np.array(state.counters.episodes).tolist())) > 1


def test_a_finished_seed_costs_no_learner_call(monkeypatch):
    """Its batch is empty, so no tile of rows is learned from for its sake."""
    seen = []

    def spied(lengths, episode_limit):
        jax.debug.callback(lambda lengths: seen.append(np.array(lengths)), lengths)
        return first_fit_rows(lengths, episode_limit)

    monkeypatch.setattr(batch_gradients, "first_fit_rows", spied)
    trainer = make_trainer(tiny_run(tiny_wqmix(), LONG, total_env_steps=10_000))
    state = trainer.init([0, 1])
    for done in (0, 0, 0, 0, 10_000):
        seen.clear()
        counters = state.counters
        state = state._replace(counters=counters._replace(env_steps=counters.env_steps.at[1].max(done)))
        state, _ = trainer.train_chunk(state)
        jax.effects_barrier()
    assert sorted(bool(lengths.all()) for lengths in seen) == [False, True]
    assert not min(seen, key=np.sum).any()


@pytest.mark.parametrize("env", [ENV, pytest.param(LONG, marks=pytest.mark.slow)], ids=["whole", "packed"])
@pytest.mark.parametrize("what", ["params", "loss"])
def test_a_failed_seed_is_frozen_at_its_first_bad_step_and_the_others_never_notice(what, env):
    trainer = _shared_trainer(env)
    sound, poisoned = trainer.init([0, 1, 2]), trainer.init([0, 1, 2])
    for iteration in range(8):
        if iteration == 4:
            poisoned = _poisoned(poisoned, what, seed=1)
        before = jax.tree.map(jnp.copy, poisoned)
        sound, _ = trainer.train_chunk(sound)
        poisoned, record = trainer.train_chunk(poisoned)
        np.testing.assert_array_equal(poisoned.failed, [False, iteration >= 4, False])
        for seed in (0, 2):
            same(poisoned, sound, where=seed)
        assert record.active[0, 1] == (iteration <= 4)
        if iteration > 4:
            same(before, poisoned, where=1)
    assert int(poisoned.counters.episodes[1]) == 5
    assert int(sound.counters.episodes[1]) == 8


@functools.cache
def _shared_trainer(env):
    return make_trainer(tiny_run(tiny_wqmix(), env))


def _poisoned(state, what, *, seed):
    """With numbers that aren't finite in the parameters, or in the targets, from where they reach the loss."""
    learner = state.learner
    if what == "params":
        params = jax.tree.map(lambda leaf: leaf.at[seed].set(jnp.nan), learner.params)
        return state._replace(learner=learner._replace(params=params))
    target = jax.tree.map(lambda leaf: leaf.at[seed].set(jnp.inf), learner.target)
    return state._replace(learner=learner._replace(target=target))


@pytest.mark.parametrize(("num_seeds", "num_envs"), [(1, 1), (3, 2)])
def test_training_never_copies_the_replay(num_seeds, num_envs):
    """The replay is written in place: a copy of it would be the largest temporary of the program."""
    config = tiny_run(tiny_wqmix(buffer_size=5000), ENV, num_envs=num_envs, eval_interval=8)
    trainer = make_trainer(config)
    state = jax.eval_shape(lambda: trainer.init(range(num_seeds)))
    compiled = trainer.train.lower(state, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    replay_bytes, row_bytes = num_seeds * trainer.replay_bytes, trainer.replay_bytes // 5000
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < replay_bytes / 2
    assert memory.alias_size_in_bytes > replay_bytes
    copies = rf"= u8\[[^]]*5000,{row_bytes}\]\S* (copy|select|concatenate)\("
    assert not re.search(copies, compiled.as_text())


@pytest.mark.slow
def test_several_updates_per_iteration_are_counted_and_draw_different_batches():
    config = tiny_run(tiny_wqmix(buffer_size=50), ENV, updates_per_iteration=3)
    state, records = trained(config, [0], 6)
    np.testing.assert_array_equal(records.updates[:, 0], [0, 3, 3, 3, 3, 3])
    assert int(state.counters.learner_steps[0]) == 15


def test_sweeping_a_traced_option_compiles_once():
    trainer = make_trainer(tiny_run(tiny_wqmix(), ENV))
    state = trainer.init([0])
    for alpha in (0.1, 0.5):
        state = state._replace(hp=state.hp._replace(alpha=jnp.full(1, alpha)))
        state, _ = trainer.train_chunk(state)
    assert trainer.train._cache_size() == 1


def learners_agree(one, other):
    for ours, its in zip(*map(jax.tree.leaves, (one.learner, other.learner)), strict=True):
        np.testing.assert_allclose(ours, its, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "algo", [tiny_wqmix(), pytest.param(tiny_masac(), marks=pytest.mark.slow)], ids=["cw_qmix", "masac"]
)
def test_a_batch_is_cut_to_the_shortest_static_length_that_holds_it(algo):
    """Cutting changes no number: short episodes are learned from 16 of 32 steps, and give the same parameters."""
    config = tiny_run(algo, LONG)
    assert _static_lengths(200) == [50, 100, 150, 200]
    assert _static_lengths(32) == [16, 32]
    assert _static_lengths(4) == [4]
    cut, records = trained(config, [0], 5, batches="cut")
    assert records.episode_length.max() <= 16
    whole, _ = trained(config, [0], 5, batches="whole")
    learners_agree(cut, whole)


LENGTHS = ((20, 28, 32, 17, 16), (7, 0, 8, 7, 9))
"""The lengths of two seeds' five episodes: any five of them fill five rows of 32 steps, and at most two."""

OPTIONS = {
    "double_q": False,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "target_update_tau": 0.1,
    "standardise_rewards": True,
    "standardise_returns": True,
}
"""Options that aren't the defaults."""

SHORT = ((9, 3, 5, 8, 9), LENGTHS[1])
"""At most ten places, within the first block on an accelerator."""


def run_of_five(algo):
    """A run with a replay of five episodes; an on-policy algorithm plays all of them in an iteration."""
    return tiny_run(algo, LONG, num_envs=5 if algo.is_on_policy else 1)


@functools.cache
def with_episodes(algo, lengths):
    """A state with one seed for each row of ``lengths``, the lengths of its episodes, half of which the task ended."""
    config = run_of_five(algo)
    replay = make_replay(config.env, buffer_size=5, batch_size=5)
    rows = []
    for each in lengths:
        episodes = [plain_episode(LONG, jax.random.key(length), length, length % 2 == 0)[0] for length in each]
        rows.append(replay.add(replay.init(), stacked(episodes), jnp.bool_(True)).experience)
    state = make_trainer(config).init(range(len(lengths)))
    return state._replace(replay=state.replay.replace(experience=jnp.stack(rows), is_full=~state.replay.is_full))


def learned_from_lengths(algo, batches=None, platform=None, lengths=LENGTHS):
    """A learner step of each seed of `with_episodes`."""
    return make_trainer(run_of_five(algo), batches=batches, platform=platform).learn(with_episodes(algo, lengths))


@functools.cache
def learned_from_whole_batches(algo, lengths=LENGTHS):
    """The reference: step by step, with all padding."""
    return learned_from_lengths(algo, "whole", "cpu", lengths)


def same_to_rounding(one, other, where=slice(None)):
    for mine, its in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(mine, its[where], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "algo",
    [
        pytest.param(tiny_wqmix(**FIVE, returns="td_lambda"), marks=pytest.mark.slow),
        pytest.param(tiny_wqmix(**FIVE, returns="sarsa_lambda"), marks=pytest.mark.slow),
        pytest.param(tiny_masac(**FIVE), marks=pytest.mark.slow),
        pytest.param(tiny_maddpg(**FIVE), marks=pytest.mark.slow),
        pytest.param(tiny_wqmix(**FIVE, returns="n_step", standardise_rewards=True), marks=pytest.mark.slow),
        tiny_wqmix(**FIVE, returns="q_lambda", **OPTIONS),
        pytest.param(tiny_resq(**FIVE, returns="td_lambda"), marks=pytest.mark.slow),
        pytest.param(tiny_dcg(**FIVE), marks=pytest.mark.slow),
        tiny_ppo(**FIVE, standardise_rewards=True),
    ],
    ids=["td_lambda", "sarsa_lambda", "masac", "maddpg", "n_step", "options", "resq", "dcg", "ppo"],
)
def test_short_episodes_that_share_rows_teach_what_they_teach_apart(algo, monkeypatch):
    """A tile of four rows and one of two, which reaches past the last and where the second seed has no step."""
    monkeypatch.setattr(batch_gradients, "LARGE_TILE", 8)
    monkeypatch.setattr(batch_gradients, "SMALL_TILE", 4)
    same_to_rounding(learned_from_lengths(algo, "packed"), learned_from_whole_batches(algo))


@pytest.mark.parametrize(
    ("platform", "batches", "algo", "lengths"),
    [
        pytest.param("tpu", "bounded", tiny_wqmix(**FIVE, returns="td_lambda"), LENGTHS, marks=pytest.mark.slow),
        pytest.param("gpu", "bounded", tiny_wqmix(**FIVE, returns="td_lambda"), SHORT, marks=pytest.mark.slow),
        pytest.param("tpu", "cut", tiny_wqmix(**FIVE, returns="td_lambda"), SHORT, marks=pytest.mark.slow),
        ("gpu", "cut", tiny_masac(**FIVE), LENGTHS),
        pytest.param("tpu", "bounded", tiny_maddpg(**FIVE), LENGTHS, marks=pytest.mark.slow),
        pytest.param(
            "tpu", "bounded", tiny_wqmix(**FIVE, returns="q_lambda", **OPTIONS), LENGTHS, marks=pytest.mark.slow
        ),
        pytest.param("tpu", "bounded", tiny_resq(**FIVE, returns="td_lambda"), LENGTHS, marks=pytest.mark.slow),
        pytest.param("tpu", "bounded", tiny_dcg(**FIVE), LENGTHS, marks=pytest.mark.slow),
        pytest.param(
            "tpu", "bounded", tiny_ppo(**FIVE, layer_norm=False, critic="obs"), LENGTHS, marks=pytest.mark.slow
        ),
    ],
    ids=["tpu bounded", "gpu bounded", "tpu cut", "gpu cut", "maddpg", "options", "resq", "dcg", "ppo"],
)
def test_accelerators_learn_what_a_cpu_learns(platform, batches, algo, lengths):
    """Nets are unrolled in blocks; bounded batches as far as the longest episode of all seeds."""
    same_to_rounding(learned_from_lengths(algo, batches, platform, lengths), learned_from_whole_batches(algo, lengths))


def test_a_bounded_batch_ends_with_the_last_place_of_its_longest_episode():
    """The place after a last step fills another block, and whole episodes fill the last one."""
    algo, places = tiny_wqmix(**FIVE, returns="td_lambda"), LONG.spec.episode_limit + 1
    block = BLOCK_FORMS["tpu"].block_length(places)
    assert 1 < block < places
    bounded = make_trainer(run_of_five(algo), batches="bounded", platform="tpu")
    whole = make_trainer(run_of_five(algo), batches="whole", platform="cpu")
    for longest in (block, places - 1):
        state = with_episodes(algo, ((longest,) * 5, (longest, 3, 3, 3, 3)))
        same_to_rounding(bounded.learn(state), whole.learn(state))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"share_parameters": "none", "agent_id": False, "weight_init": "orthogonal"}, marks=pytest.mark.slow
        ),
        pytest.param({"share_parameters": [[1, 0]], "layer_norm": True, "last_action": False}, marks=pytest.mark.slow),
        {"recurrent": False, "share_parameters": "none"},
    ],
    ids=["alone", "normalised", "feedforward"],
)
def test_every_form_of_agents_learns_the_same_from_packed_batches_and_on_accelerators(options, monkeypatch):
    monkeypatch.setattr(batch_gradients, "LARGE_TILE", 8)
    monkeypatch.setattr(batch_gradients, "SMALL_TILE", 4)
    algo = tiny_wqmix(**FIVE, **options)
    expected = learned_from_whole_batches(algo)
    same_to_rounding(learned_from_lengths(algo, "packed"), expected)
    same_to_rounding(learned_from_lengths(algo, "bounded", "tpu"), expected)


def test_an_unmarked_loss_learns_the_same(monkeypatch):
    algo = tiny_wqmix(**FIVE, returns="td_lambda")
    expected = learned_from_whole_batches(algo)
    monkeypatch.delattr(WQMIX.loss, "is_mean_over_steps")
    same_to_rounding(learned_from_lengths(algo, platform="tpu"), expected)


def test_a_seed_alone_learns_what_it_learns_in_company_on_an_accelerator():
    """With fewer blocks: only the other seed's episodes are long."""
    algo = tiny_wqmix(**FIVE, returns="td_lambda")
    together = learned_from_lengths(algo, "bounded", "tpu", LENGTHS[::-1])
    alone = learned_from_lengths(algo, "bounded", "tpu", LENGTHS[1:])
    same_to_rounding(alone, together, where=slice(0, 1))


def test_a_tile_is_unrolled_as_far_as_its_fullest_row(monkeypatch):
    """The fullest row of all seeds, with the place after an episode's last step."""
    seen, loss = [], WQMIX.loss

    @functools.wraps(loss)
    def spied(algo, params, target, batch, *args):
        is_filled = batch.state[..., -1] == 1  # a constant of the environment; padding is zero
        if batch.num_places is not None:  # as in the loop
            jax.debug.callback(lambda *args: seen.append(jax.tree.map(np.asarray, args)), batch.num_places, is_filled)
        return loss(algo, params, target, batch, *args)

    monkeypatch.setattr(batch_gradients, "LARGE_TILE", 8)
    monkeypatch.setattr(batch_gradients, "SMALL_TILE", 4)
    monkeypatch.setattr(WQMIX, "loss", spied)
    jax.block_until_ready(learned_from_lengths(tiny_wqmix(**FIVE), "packed"))
    jax.effects_barrier()
    for size in (4, 2):
        both_seeds = [(int(num_places), filled) for num_places, filled in seen if len(filled) == size]
        [num_places] = {num_places for num_places, _ in both_seeds}
        assert num_places == max(filled.any(0).sum() for _, filled in both_seeds) < 33


def test_a_bounded_batch_is_unrolled_as_far_as_its_longest_episode(monkeypatch):
    seen = []

    def without_loss(batching, batch):
        jax.debug.callback(lambda num_places: seen.append(int(num_places)), batch.num_places)
        metrics = dict.fromkeys(batching.metric_names, jnp.zeros(len(batch.mask)))
        return lambda learner, *_: (learner.params, Aux(metrics, {}))

    monkeypatch.setattr(batch_gradients, "_seeds_gradient", without_loss)
    learned_from_lengths(tiny_wqmix(**FIVE, returns="td_lambda"), "bounded", "tpu", SHORT)
    jax.effects_barrier()
    assert seen == [10]


def batching_of(algo, env=LONG, **choices):
    replay = make_replay(env, buffer_size=5, batch_size=algo.batch_size)
    return make_batching(env, algo, replay, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), **choices)


UNMARKED = build("algo", {"_target_": "tests.environments.ContextTeller", **TINY})


@pytest.mark.parametrize("platform", ["cpu", "gpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("is_marked", [True, False])
def test_batches_and_the_form_of_the_nets_are_chosen_by_platform(platform, is_marked):
    batching = batching_of(tiny_wqmix() if is_marked else UNMARKED, platform=platform)
    on_cpu = platform == "cpu"
    assert batching.block_form == (None if on_cpu else BLOCK_FORMS[platform])
    assert (batching.block_form is None) == on_cpu
    assert (batching.tiles is not None) == (is_marked and on_cpu)
    assert batching.is_bounded == (is_marked and not on_cpu)
    bounded = [32 if platform == "tpu" else 33]  # 33 places fill three blocks of 11, or are padded to two of 17
    assert batching.lengths == (bounded if batching.is_bounded else [16, 32])
    assert (batching.cache_seeds is not None) == on_cpu


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_episodes_too_short_to_be_cut_are_whole(platform):
    batching = batching_of(tiny_wqmix(), Clock(episode_limit=31, ends_from=1), platform=platform)
    assert (batching.tiles, batching.is_bounded, batching.lengths) == (None, False, [31])


@pytest.mark.parametrize("batches", ["packed", "bounded"])
def test_an_unmarked_loss_is_neither_packed_nor_bounded(batches):
    with pytest.raises(ValueError, match=f"batches={batches} is not allowed: the loss of ContextTeller"):
        make_trainer(tiny_run(UNMARKED, LONG), batches=batches)


def test_a_loss_that_does_not_report_itself_is_refused():
    """A run would not notice that it diverges."""
    algo = build("algo", {"_target_": "tests.environments.WithoutLossMetric", **TINY})
    message = "algo._target_=tests.environments.WithoutLossMetric is not allowed: its Aux.metrics lacks loss, "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        make_trainer(tiny_run(algo, LONG))


def test_a_batch_without_a_step_teaches_nothing():
    """Every episode failed at its first step; MADDPG's parameters stay finite too."""
    config = tiny_run(tiny_maddpg(**FIVE), LONG)
    trainer = make_trainer(config, batches="cut")
    state = trainer.init([0])
    empty = state.replay.replace(is_full=~state.replay.is_full)
    learner, losses = trainer.learn(state._replace(replay=empty))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((learner.params, losses)))


@pytest.mark.parametrize(
    ("cache_bytes", "memory_groups", "expected"),
    [(None, 1, 1), (None, 3, 3), (10**9, 1, 1), (10**9, 2, 2), (1, 1, 6), ("three batches", 1, 2), ("five", 1, 2)],
)
def test_seeds_learn_in_groups_that_a_cpus_cache_holds(cache_bytes, memory_groups, expected, monkeypatch):
    env, algo = Clock(episode_limit=8, ends_from=8), tiny_wqmix(batch_size=2)
    replay = make_replay(env, buffer_size=4, batch_size=2)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    batch = jax.eval_shape(lambda row: replay.decode(row, 8), jnp.zeros((2, replay.row_bytes), jnp.uint8))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch._replace(compact=None)))
    cache_bytes = {"three batches": 3 * size, "five": 6 * size - 1}.get(cache_bytes, cache_bytes)
    if cache_bytes is not None:
        monkeypatch.setattr(batch_gradients, "CPU_CACHE_BYTES", cache_bytes)
    batching = make_batching(env, algo, replay, sharding, memory_groups=memory_groups)
    batching = batching if cache_bytes else batching._replace(cache_seeds=None)  # as on a GPU
    assert num_groups(batching, 6) == expected


@pytest.mark.parametrize(("platform", "effort", "expected"), [("tpu", 0, -1.0), ("tpu", 0.5, None), ("gpu", 0, None)])
def test_programs_for_a_tpu_are_compiled_with_the_least_effort_unless_the_user_sets_one(platform, effort, expected):
    sharding = types.SimpleNamespace(device_set=[types.SimpleNamespace(platform=platform)])
    before = jax.config.values["jax_exec_time_optimization_effort"]
    jax.config.update("jax_exec_time_optimization_effort", effort)
    try:
        assert compiler_options(sharding).get("exec_time_optimization_effort") == expected
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


@pytest.mark.parametrize("limit", [1, 11, 12, 32, 200])
def test_bounded_batches_hold_whole_episodes_and_fill_whole_blocks(limit):
    form = BlockForm(12, steps_inline=1)
    length = batch_gradients._whole_blocks(form, limit)
    assert limit <= length < limit + 12
    assert (length + 1) % form.block_length(limit + 1) == 0
