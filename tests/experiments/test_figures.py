"""The figures' yamls compared with the paper's sections 7, B, C and D, copied by hand."""

import pytest

from experiments.figures import Figure, figure_names, load_figure, runs
from wqmix_jax import load_config
from wqmix_jax.errors import ConfigError

MILLION = 1_000_000
PREDATOR_PREY = {"env": "predator_prey", "total_env_steps": MILLION, "eval_episodes": 16, "anneal": 50_000}
SMAC = {"env": "smac", "total_env_steps": 2 * MILLION, "eval_episodes": 32, "anneal": MILLION}
ROBUSTNESS = {"CW-QMIX": {"alpha": 0.75}, "OW-QMIX": {"alpha": 0.75}, "QMIX": {}, "VDN": {}, "QPLEX": {}, "MADDPG": {}}
SUPER_HARD = {
    "CW-QMIX, 50k": {"alpha": 0.75, "anneal": 50_000},
    "CW-QMIX, 1M": {"alpha": 0.75},
    "OW-QMIX, 50k": {"alpha": 0.5, "anneal": 50_000},
    "OW-QMIX, 1M": {"alpha": 0.5},
    "QMIX, 50k": {"anneal": 50_000},
    "QMIX, 1M": {},
}
ABLATIONS = ("CW-QMIX", "OW-QMIX", "QMIX + CW", "QMIX + OW")
QTRAN = {"lambda_opt": 1, "mixer_embed_dim": 64, "mixer_layers": 3}


def with_alpha(alpha, *lines):
    return {line: {"alpha": alpha} for line in lines}


APPENDIX_B = {
    ("fig2", "predator-prey"): (
        PREDATOR_PREY,
        with_alpha(0.1, "CW-QMIX", "OW-QMIX")
        | {"QMIX": {}, "VDN": {}, "QTRAN": QTRAN | {"lambda_nopt": 10}, "MADDPG": {}}
        | {"MASAC": {"alpha_ent": 0.001, "epsilon_start": 0.5, "epsilon_finish": 0.01, "anneal": 100_000}},
    ),
    ("fig3", "3s5z"): (SMAC, ROBUSTNESS | {"QTRAN": QTRAN | {"lambda_nopt": 1}, "MASAC": {"alpha_ent": 0}}),
    ("fig3", "5m_vs_6m"): (SMAC, ROBUSTNESS | {"QTRAN": QTRAN | {"lambda_nopt": 10}, "MASAC": {"alpha_ent": 0.01}}),
    ("fig4", "6h_vs_8z"): (SMAC, SUPER_HARD),
    ("fig5", "3s5z_vs_3s6z"): (SMAC, SUPER_HARD),
    ("fig5", "corridor"): (SMAC, SUPER_HARD),
    ("fig6", "corridor"): (
        SMAC,
        {line: {"alpha": 0.75, "q_star": "attention"} for line in ("CW-QMIX", "OW-QMIX")} | {"QMIX": {}},
    ),
    ("fig7", "predator-prey"): (
        PREDATOR_PREY,
        with_alpha(0.1, *ABLATIONS) | {"QMIX + OW": {"alpha": 0.5}, "QMIX + Q*": {"weighting": "uniform"}},
    ),
    ("fig8", "3s5z"): (SMAC, with_alpha(0.75, *ABLATIONS) | {"QMIX + Q*": {"weighting": "uniform"}}),
    ("fig8", "5m_vs_6m"): (SMAC, with_alpha(0.75, *ABLATIONS) | {"QMIX + Q*": {"weighting": "uniform"}}),
} | {
    ("fig9", f"{algo}, {smac_map}"): (
        SMAC,
        {f"alpha = {alpha}": {"alpha": alpha, "weighting": weighting} for alpha in (0.01, 0.1, 0.5, 0.75)},
    )
    for algo, weighting in (("CW-QMIX", "central"), ("OW-QMIX", "optimistic"))
    for smac_map in ("3s5z", "5m_vs_6m")
}

PARTS = {
    "CW-QMIX": {"weighting": "central", "q_star": "feedforward"},
    "OW-QMIX": {"weighting": "optimistic", "q_star": "feedforward"},
    "QMIX + CW": {"weighting": "central", "q_star": "none"},
    "QMIX + OW": {"weighting": "optimistic", "q_star": "none"},
    "QMIX + Q*": {"weighting": "uniform", "q_star": "feedforward"},
    "QMIX": {"mixer": "qmix"},
    "VDN": {"mixer": "vdn"},
}
"""Options that define the algorithm of a label."""

FIGURES = {name: load_figure(name) for name in figure_names()}
ALL = [(name, run) for name, figure in FIGURES.items() for run in runs(figure) if run.line in figure.lines]
FURTHER = [run for figure in FIGURES.values() for run in runs(figure) if run.line in figure.further]


def test_every_figure_of_the_results_is_there():
    assert figure_names() == [f"fig{number}" for number in range(2, 10)]
    drawn = {(name, run.panel): set() for name, run in ALL}
    for name, run in ALL:
        drawn[name, run.panel].add(run.line)
    assert drawn == {key: set(lines) for key, (_, lines) in APPENDIX_B.items()}


@pytest.mark.parametrize(("name", "run"), ALL, ids=lambda value: value if isinstance(value, str) else value.line)
def test_a_run_has_the_papers_settings(name, run):
    shared, lines = APPENDIX_B[name, run.panel]
    expected = PARTS.get(run.line.split(",")[0], {}) | shared | lines[run.line]
    on_smac = [override for override in run.overrides if override.startswith("env.map=")]
    assert [override for override in run.overrides if override.startswith("env=")] == [f"env={expected.pop('env')}"]
    assert on_smac == ([] if "predator-prey" in run.panel else [f"env.map={run.panel.split(', ')[-1]}"])
    config = load_config(*(override for override in run.overrides if not override.startswith(("env=", "env."))))
    assert config.algo.epsilon_anneal_steps == expected.pop("anneal")
    for key, value in expected.items():
        assert getattr(config if key in ("total_env_steps", "eval_episodes") else config.algo, key) == value, key


def test_what_was_searched_holds_what_was_chosen():
    grids = {name: figure.searched for name, figure in FIGURES.items()}
    assert grids["fig2"]["QTRAN"] == {"algo.lambda_nopt": [0.1, 1, 10], "algo.mixer_embed_dim": [64, 256]}
    assert grids["fig2"]["MASAC"] == {"algo.alpha_ent": [0, 0.001, 0.01, 0.1]}
    assert grids["fig3"]["MASAC"] == {"algo.alpha_ent": [0, 0.001, 0.01]}
    assert grids["fig3"]["QTRAN"] == {"algo.lambda_nopt": [1, 10], "algo.mixer_embed_dim": [64, 256]}
    assert grids["fig6"]["OW-QMIX"] == {"algo.alpha": [0.5, 0.75]}
    for name, run in ALL:
        values = dict(override.lstrip("+").split("=") for override in run.overrides)
        for key, grid in grids[name].get(run.line, {}).items():
            assert float(values[key]) in grid, (name, run.line, key)


def test_further_lines_are_named_by_their_algorithms_and_play_the_papers_task():
    assert {"dcg", "powqmix", "resq", "mappo", "pqn_vdn"} <= {run.algo for run in FURTHER}
    task = load_config("+algo=qmix", "env=predator_prey").env
    for run in FURTHER:
        assert run.folder.name == run.algo
        assert load_config(*run.overrides).env == task


def test_a_further_line_is_none_of_the_papers():
    figure = FIGURES["fig2"].model_dump() | {"further": {"VDN": ["+algo=vdn"]}}
    with pytest.raises(ValueError, match=r"further=\['VDN'\] is not allowed: these are lines of the paper's figure"):
        Figure(**figure)


def test_a_figure_is_drawn_on_its_own_environments_alone():
    figure = load_figure("fig3")
    assert {run.overrides[0] for run in runs(figure, "smax")} == {"env=smax"}
    assert {load_config(*run.overrides).env.max_return for run in runs(figure, "smax")} == {20.0}
    with pytest.raises(ConfigError, match=r"env=predator_prey is not allowed: this figure is drawn on smac or smax"):
        runs(figure, "predator_prey")
    with pytest.raises(ConfigError, match=r"figure=fig1 is not allowed: choose one of fig2, "):
        load_figure("fig1")
