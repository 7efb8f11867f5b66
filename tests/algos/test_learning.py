"""The algorithms learn the matrix game that QMIX was built to fail at, at full width and ten seeds."""

import pytest

from experiments import table2


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ow_qmix", "cw_qmix"])
def test_weighted_qmix_finds_the_optimum_of_table_2_on_every_seed(algo: str) -> None:
    assert table2.train(algo)["payoffs"] == [table2.OPTIMUM] * table2.NUM_SEEDS
