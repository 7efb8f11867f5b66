import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.training.row_packing import first_fit_rows


def unpacked(layout):
    """``{(episode, step): how often}``, read off place by place; an episode's steps must follow each other in a row."""
    counts = {}
    for episodes, steps, filled in zip(*map(np.asarray, layout), strict=True):
        before = None
        for episode, step, full in zip(episodes, steps, filled, strict=True):
            here = (int(episode), int(step)) if full else None
            if here and here[1] > 0:
                assert before == (here[0], here[1] - 1)
            if here:
                counts[here] = counts.get(here, 0) + 1
            before = here
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_every_step_of_every_episode_has_one_place(seed):
    """And what is seen after its last step; the fullest rows come first."""
    lengths = np.random.default_rng(seed).integers(0, 13, 10)
    layout, num_rows = first_fit_rows(jnp.asarray(lengths, jnp.int32), 12)
    expected = {(b, s): 1 for b, length in enumerate(lengths) for s in range(length + 1) if length}
    assert unpacked(layout) == expected
    assert layout.filled.any(1).tolist() == [row < num_rows for row in range(10)]
    held = layout.filled.sum(1)
    assert (held[:-1] >= held[1:]).all()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([12, 12, 12, 12], 4),  # nothing fits next to a whole one
        ([6, 5, 6, 5], 2),  # 7 + 6 places fill 13
        ([6, 6, 6, 6], 4),  # 7 + 7 do not
        ([5, 5, 5, 12], 3),
        ([1, 3, 2, 2], 1),
        ([12, 0, 1, 9], 2),
        ([0, 0, 0, 0], 0),
    ],
)
def test_rows_that_short_episodes_share(lengths, expected):
    assert int(first_fit_rows(jnp.asarray(lengths, jnp.int32), 12)[1]) == expected


def test_batches_of_several_seeds_are_packed_apart():
    lengths = jnp.asarray([[6, 5, 6, 5], [12, 12, 1, 1]], jnp.int32)
    both, num_rows = jax.vmap(lambda row: first_fit_rows(row, 12))(lengths)
    assert num_rows.tolist() == [2, 3]
    alone = first_fit_rows(lengths[1], 12)[0]
    for together, by_itself in zip(both, alone, strict=True):
        np.testing.assert_array_equal(together[1], by_itself)
