"""The command line, in this process and as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wqmix_jax.tabular.__main__ import main

ROOT = Path(__file__).parent.parent.parent


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(arguments)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_table_1_is_printed_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "table1") == [
        "Q      Q_tot 1    Q_tot 2    Q_tot 3    Q_tot 4",
        "1  0     1  1/3   2/3  2/3   2/3    0   1/3  1/3",
        "0  1   1/3  1/3     0  2/3   2/3  2/3   1/3    1",
        "",
        "loss                  2/3",
        "minimisers            4",
        "argmax of Q           (0,0) (1,1)",
        "argmax of Q_tot       of Q_tot 1: (0,0)",
        "decentralised greedy  of Q_tot 1: (0,0), worth 1",
    ]


def test_table_2_and_an_optimistic_weighting(capsys: pytest.CaptureFixture[str]) -> None:
    """Alpha is 0.1 by default."""
    lines = printed(capsys, "table2", "--weighting", "optimistic")
    assert lines[1] == "  8  -12  -12        8  -12/11  -12/11"
    assert "loss                  576/11" in lines
    assert lines == printed(capsys, "table2", "--weighting", "optimistic", "--alpha", "0.1")
    assert lines != printed(capsys, "table2", "--weighting", "optimistic", "--alpha", "0.2")


def test_a_wrong_greedy_joint_action_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "table2", "--greedy", "1", "1")
    assert "loss                  320" in lines
    assert "decentralised greedy  (1,1), worth 0" in lines


def test_three_agents_are_printed_in_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "payoff.json"
    file.write_text("[[[1, 2], [3, 4.5]]]")
    assert printed(capsys, str(file))[:3] == [
        "Q(0, .., ..)   Q_tot(0, .., ..)",
        "  1    2         1    2",
        "  3  9/2         3  9/2",
    ]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "payoff.json"
    file.write_text("[[2, -10], [0, 1]]")
    [line] = printed(capsys, str(file), "--weighting", "central", "--alpha", "0.25", "--json")
    q_tot = [[pytest.approx(1.6), -10], [pytest.approx(1.6), 1]]
    assert json.loads(line) == {
        "q_tot": q_tot,
        "loss": pytest.approx(0.8),
        "argmax_set": [[0, 0], [1, 0]],
        "decentralised_greedy": [1, 0],
        "minimisers": [q_tot],
        "unique": True,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2], [3]]", "lists on the same level must be equally long"),
        ("[[1, NaN], [0, 1]]", "each payoff must be finite in float32"),
        ("[[1, 1e400], [0, 1]]", "each payoff must be finite in float32"),
        ("[]", "at least one agent and one action are needed"),
        ("[[], []]", "at least one agent and one action are needed"),
        ("3", "at least one agent and one action are needed"),
        ("", "is not JSON: Expecting value"),
        ("[[1, 2], [3,", "is not JSON: Expecting value"),
        ('"table1"', "a nested list of numbers is needed"),
        ('{"payoff": [1, 2]}', "a nested list of numbers"),
        ('[["1", "2"]]', "a nested list of numbers"),
        ("null", "a nested list of numbers"),
        ("[" * 100_000, "is nested too deeply"),
        ("[" * 40 + "1" + "]" * 40, "at most 32 agents"),
        (json.dumps([[0] * 7] * 7), "has 7 x 7 actions, which is too many: at most 1,000,000 orderings are tried"),
        (json.dumps([[[0] * 4] * 4] * 4), "has 4 x 4 x 4 joint actions, which is too many"),
        (json.dumps([[0] * 1000] * 1000), "is too large: at most 1,000,000 bytes are read"),
        ("[[1" + "0" * 5000 + ", 1]]", "4300 digits"),
    ],
)
def test_a_file_without_a_payoff_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "payoff.json"
    file.write_text(content)
    refused(capsys, [str(file)], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: payoff"),
        (["table3"], "table3 is not there: name table1, table2, climbing, "),
        ([str(ROOT)], "can't be read"),
        (["table1", "--weighting", "centre"], "argument --weighting: invalid choice: 'centre'"),
        (
            ["table1", "--weighting", "central", "--alpha", "0"],
            "alpha=0.0 is not allowed: a number above 0 and at most 1",
        ),
        (["table1", "--weighting", "central", "--alpha", "nan"], "alpha=nan is not allowed"),
        (["table1", "--weighting", "optimistic", "--alpha", "1.5"], "alpha=1.5 is not allowed"),
        (
            ["table1", "--alpha", "0.5"],
            "alpha=0.5 is not allowed: the weighting is uniform; name central or optimistic",
        ),
        (["table1", "--greedy", "0"], "greedy=(0,) is not allowed"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    refused(capsys, arguments, message)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_it_starts_without_jax() -> None:
    code = "import runpy, sys; sys.argv = ['', 'table2']; runpy.run_module('wqmix_jax.tabular', run_name='__main__')"
    code += "; assert 'jax' not in sys.modules and 'scipy.optimize' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "loss                  288" in result.stdout
