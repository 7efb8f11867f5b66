"""The demo trains the tasks of its text, and draws them."""

import re
from pathlib import Path

import matplotlib.image
import pytest

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
        (name, algo): records([0, 9 if algo == "ow_qmix" else 0]) for name in demo.TASKS for algo in demo.ALGORITHMS
    }
    demo.draw(curves, tmp_path / "demo.png")
    pixels = (matplotlib.image.imread(tmp_path / "demo.png")[..., :3] * 255).round()
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        assert (pixels == colour).all(-1).sum() > 300
    assert demo.verdict(demo.TASKS["table2"], curves["table2", "ow_qmix"]).startswith("2 of 2 seeds end at 80% or more")
    assert demo.verdict(demo.TASKS["table2"], curves["table2", "qmix"]).startswith("0 of 2 seeds")


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
    assert "OW-QMIX on Table 2's game: 8 of 8 seeds" in out
    assert "QMIX on Table 2's game: 0 of 8 seeds" in out
    [solved] = re.findall(r"OW-QMIX on a small predator-prey: (\d) of 4 seeds", out)
    assert int(solved) >= 2
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["demo.png", "predator_prey.gif"]
