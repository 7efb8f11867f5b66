"""Options of runs are compared by one rule, see also the tests of merge, compare, table and resume."""

from wqmix_jax.records.run_dir import differing


def test_options_that_differ_are_listed_in_the_order_of_their_appearance() -> None:
    settings = ({"b": 1, "a": [1, 2], "c": "x"}, {"a": [1, 3], "b": 1, "d": 2}, {"a": [1, 2], "b": 2, "c": "x"})
    assert differing(*settings) == ["b", "a", "c", "d"]
    assert differing(settings[0], settings[2]) == ["b"]
    assert differing(settings[0]) == []


def test_an_option_that_a_run_does_not_record_counts_as_none() -> None:
    assert differing({"env.game_version": None}, {}) == []
    assert differing({}, {"env.game_version": "4.6.2"}) == ["env.game_version"]
