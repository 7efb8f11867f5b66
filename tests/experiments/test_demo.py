"""The demo trains the tasks of its text, and draws them."""

import re
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from experiments.examples import demo
from wqmix_jax import load_config


def records(values: list[float]) -> demo.Records:
    return [
        {"kind": "eval", "seed": seed, "env_steps": 100 * at, "episode_return": value}
        for at, value in enumerate(values)
        for seed in (0, 1)
    ]


def test_the_tasks_are_those_of_the_text() -> None:
    for algo in demo.ALGORITHMS:
        game = load_config(f"+algo={algo}", *demo.TASKS["table2"].overrides)
        assert max(max(row) for row in game.env.payoff) == demo.TASKS["table2"].best
        hunt = load_config(f"+algo={algo}", *demo.TASKS["predator_prey"].overrides).env
        assert hunt.num_stags * hunt.reward_stag == demo.TASKS["predator_prey"].best
        assert hunt.punishment == -2


def test_a_picture_and_a_verdict(tmp_path: Path) -> None:
    curves = {
        (name, algo): records([0, task.best if algo == "ow_qmix" else 0])
        for name, task in demo.TASKS.items()
        for algo in demo.ALGORITHMS
    }
    demo.draw(curves, tmp_path / "demo.png")
    pixels = (matplotlib.image.imread(tmp_path / "demo.png")[..., :3] * 255).round()
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        assert (pixels == colour).all(-1).sum() > 300
    sentence = "2 of 2 seeds end at 80% or more of the best return, 8 (0 untrained)"
    assert demo.verdict(demo.TASKS["table2"], curves["table2", "ow_qmix"]) == sentence
    assert demo.verdict(demo.TASKS["table2"], curves["table2", "qmix"]).startswith("0 of 2 seeds")


def test_the_share_of_seeds_that_play_the_optimum_is_drawn() -> None:
    axes = Figure().subplots()
    lines = [*records([8, 0, 8]), {"kind": "eval", "seed": 2, "env_steps": 0, "episode_return": -12.0}]
    demo._draw_shares(axes, demo.TASKS["table2"], {"ow_qmix": lines, "qmix": records([0, -12])})
    shares = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert shares[0] == [[0, pytest.approx(200 / 3)], [100, 0], [200, 100]]
    assert shares[1] == [[0, 0], [100, 0]]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("results")
    with pytest.raises(SystemExit) as ended:
        demo.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --out {tmp_path} is not allowed: it isn't empty")


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.main(["--out", str(tmp_path / "demo")])
    out = capfd.readouterr().out
    [(right, before), (wrong, _)] = re.findall(r"QMIX on Table 2's game: (\d+) of 64 seeds .* \((\d+) untrained\)", out)
    assert int(right) == 64
    assert int(wrong) < 10 < int(before) < 30
    [solved] = re.findall(r"OW-QMIX on a small predator-prey: (\d) of 4 seeds", out)
    assert int(solved) >= 2
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["demo.png", "predator_prey.gif"]
