"""The algorithms learn the matrix game that QMIX was built to fail at, at full width and ten seeds."""

import pytest

from experiments import table2


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ow_qmix", "cw_qmix", "resq", "powqmix"])
def test_weighted_qmix_finds_the_optimum_of_table_2_on_every_seed(algo: str) -> None:
    row = table2.train("table2", algo, num_seeds=10)
    assert (row["right"], row["payoffs"]) == (10, [8.0] * 10)
