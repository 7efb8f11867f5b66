"""The harness sees what it is there to see: each test breaks a number or the code, and the comparison must say so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parity import environment_cases, harness, learner_cases, test_parity
from tests.parity.comparison import EXACT, Report, Tolerance
from tests.parity.harness import GOLDEN, CaseFile, learner_case
from tests.parity.learner_cases import CannotRun, NotYetCovered, Run, Step
from wqmix_jax.ops import weighting
from wqmix_jax.training import learner
from wqmix_jax.types import PyTree

ROOT = GOLDEN.parent.parent


class Ran:
    """A recording that has been run in float64, with its compiled step."""

    def __init__(self, name: str) -> None:
        self.file: CaseFile = harness.load(GOLDEN / f"{name}.npz")
        self.case = learner_case(self.file.path, self.file.config)
        with jax.enable_x64(True):
            self.step: Step = learner_cases.compile_step(learner_cases.build_algorithm(self.case, self.file.config))
        self.ran: Run = self.again(self.file.arrays)

    def again(self, arrays: learner_cases.Arrays) -> Run:
        return learner_cases.run(self.case, arrays, self.file.config, "float64", self.step)

    def compare(self, arrays: learner_cases.Arrays, ran: Run | None = None) -> Report:
        return learner_cases.compare_run(ran or self.ran, arrays, self.file.config, "float64")


@pytest.fixture(scope="module")
def central() -> Ran:
    return Ran("learner_qmix_w_cw_public_0")


@pytest.fixture(scope="module")
def optimistic() -> Ran:
    return Ran("learner_qmix_w_ow_public_0")


@pytest.fixture(scope="module")
def maddpg() -> Ran:
    return Ran("learner_ddpg_public_1")


@pytest.fixture(scope="module")
def masac() -> Ran:
    return Ran("learner_sac_public_1")


def test_every_recorded_number_is_compared(central: Ran) -> None:
    """The largest entry of each tensor moves by 1e-6 of itself; one of a discrete tensor by one."""
    arrays = central.file.arrays
    assert central.compare(arrays).failures == []
    assert _missed(central) == []


def test_every_recorded_number_of_the_actor_critics_is_compared(maddpg: Ran, masac: Ran) -> None:
    """Except those of the mixer, which the authors' learners carry along and never use, and one that has no meaning."""
    for each, unused in ((maddpg, ["expected/_"]), (masac, [])):
        assert each.compare(each.file.arrays).failures == []
        assert [name for name in _missed(each) if "/mixer/" not in name] == unused


def test_recorded_noise_is_what_is_drawn(maddpg: Ran, masac: Ran) -> None:
    """Another recorded draw of a target action changes one target; another Gumbel number one agent's gradient."""
    name = "noise/step1/sampled_target_actions"
    drawn, allowed = masac.file.arrays[name].copy(), masac.file.arrays["batch/avail_actions"][0, 1, 0]
    drawn[0, 1, 0] = next(action for action in np.flatnonzero(allowed) if action != drawn[0, 1, 0])
    changed = masac.again(masac.file.arrays | {name: drawn})
    assert (changed.values["td_target"] != masac.ran.values["td_target"]).sum() == 1
    name = "noise/step1/gumbel"
    gumbel = maddpg.file.arrays[name].copy()
    gumbel[0, 0, 0] = np.eye(gumbel.shape[-1])[maddpg.file.arrays["batch/actions"][0, 0, 0, 0]] * 10
    changed = maddpg.again(maddpg.file.arrays | {name: gumbel})
    assert (changed.values["objectives"] != maddpg.ran.values["objectives"]).tolist() == [True, False]


def test_a_number_stored_in_float32_is_compared_to_its_precision(central: Ran) -> None:
    name = "grads/agent/fc1.weight"
    stored = central.file.arrays[name].astype(np.float32)
    assert central.compare(central.file.arrays | {name: stored}).failures == []
    perturbed = (stored * np.float64(1 + 1e-6)).astype(np.float32)
    [seen] = central.compare(central.file.arrays | {name: perturbed}).failures
    assert seen.startswith(name)


def test_what_a_file_does_not_hold_is_reported(central: Ran) -> None:
    thinned = {name: array for name, array in central.file.arrays.items() if not name.startswith("after1/")}
    report = central.compare(thinned)
    assert report.failures == []
    assert "absent: after1" in report.contents()
    nothing = {name: array for name, array in thinned.items() if not name.startswith("expected/")}
    with pytest.raises(CannotRun, match="no expected/ values"):
        central.compare(nothing)


def test_a_weight_on_a_tie_is_alpha(central: Ran, optimistic: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both inequalities are strict: where the two sides are equal and nothing else raises it, the weight is alpha."""
    central_tie = _tie(central, "greedy_value", ~central.file.arrays["expected/is_max_action"][..., 0])
    optimistic_tie = _tie(optimistic, "q_tot", np.array(True))
    assert central.compare(central_tie, central.again(central_tie)).failures == []
    assert optimistic.compare(optimistic_tie, optimistic.again(optimistic_tie)).failures == []

    def central_not_strict(is_greedy: jax.Array, y: jax.Array, greedy_value: jax.Array, alpha: jax.Array) -> jax.Array:
        return jnp.where(is_greedy | (y >= greedy_value), jnp.ones_like(y), alpha)

    def optimistic_not_strict(td_error: jax.Array, alpha: jax.Array) -> jax.Array:
        return jnp.where(td_error <= 0, jnp.ones_like(td_error), alpha)

    monkeypatch.setattr(weighting, "central", central_not_strict)
    monkeypatch.setattr(weighting, "optimistic", optimistic_not_strict)
    for each, tie in ((central, central_tie), (optimistic, optimistic_tie)):
        [seen] = learner_cases.compare(each.case, tie, each.file.config, "float64").failures
        assert seen.startswith("expected/ws: 1 of ")


def test_eps_inside_the_square_root_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rms = optax.scale_by_rms
    monkeypatch.setattr(optax, "scale_by_rms", lambda **options: rms(**options | {"eps_in_sqrt": True}))
    assert _groups_that_differ("learner_iql_public_0") == {"trace", "after1", "after5"}


def test_a_clip_per_net_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip_each(grads: PyTree, max_norm: jax.Array) -> tuple[PyTree, jax.Array]:
        return {net: clip(tree, max_norm)[0] for net, tree in grads.items()}, optax.tree.norm(grads)

    clip = learner.clip_by_joint_norm
    monkeypatch.setattr(learner, "clip_by_joint_norm", clip_each)
    assert _groups_that_differ("learner_qmix_public_1") == {"trace", "after1", "after5"}


def test_a_step_of_the_environment_is_compared() -> None:
    file = harness.load(GOLDEN / "env_limit_public.npz")
    assert environment_cases.compare(file.arrays, file.config).failures == []
    for name in ("step/post_prey_pos", "step/post_agents_active", "step/reward", "step/episode_limit", "init/avail"):
        changed = file.arrays[name].copy()
        changed.flat[0] += 1 if changed.flat[0] == 0 else -1
        failures = environment_cases.compare(file.arrays | {name: changed}, file.config).failures
        assert name in {failure.split(":")[0] for failure in failures}


def test_double_precision_stays_inside_the_harness(central: Ran) -> None:
    assert central.ran.values["q_tot"].dtype == np.float64
    assert jnp.zeros(()).dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "config", "case"),
    [
        ("learner_qmix_public_0", {}, "qmix"),
        ("learner_cw_qmix_w1_some_word_12", {}, "cw_qmix_w1"),
        ("learner_qmix_w_ow_x_0", {"case": "qmix_w_ow"}, "qmix_w_ow"),
        ("learner_cw_qmix_atten_0", {"case": "cw_qmix"}, "cw_qmix"),  # a tag that is the end of another case
        ("learner_vdn_sac_3", {"case": "something else"}, "vdn"),
    ],
)
def test_the_case_is_found_whatever_the_tag(name: str, config: dict[str, str], case: str) -> None:
    assert learner_case(Path(f"{name}.npz"), config) == case


@pytest.mark.parametrize("name", ["learner_dqn_public_0", "learner_public", "results"])
def test_a_file_that_is_no_case_cannot_be_run(name: str) -> None:
    with pytest.raises(CannotRun):
        learner_case(Path(f"{name}.npz"), {})


def test_a_case_is_covered_as_soon_as_its_algorithm_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_cases, "CONFIG_DIR", tmp_path)
    with pytest.raises(NotYetCovered, match="qtran is not yet covered"):
        learner_cases.check_covered("qtran")
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "qtran.yaml").touch()
    learner_cases.check_covered("qtran")


def test_an_option_of_a_case_is_covered_as_soon_as_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(learner_cases.CASES, "now", learner_cases.Case("ow_qmix", {"q_star": "feedforward"}))
    monkeypatch.setitem(learner_cases.CASES, "later", learner_cases.Case("ow_qmix", {"q_star": "clairvoyant"}))
    learner_cases.check_covered("now")
    with pytest.raises(NotYetCovered, match="later is not yet covered: ow_qmix has no q_star=clairvoyant"):
        learner_cases.check_covered("later")


def test_an_empty_folder_and_none_at_all_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_parity, "FOLDER", tmp_path)
    with pytest.raises(AssertionError, match=r"there is no \.npz in"):
        test_parity.test_there_are_recordings()
    monkeypatch.setattr(test_parity, "FOLDER", tmp_path / "missing")
    with pytest.raises(AssertionError, match="missing is not a folder"):
        test_parity.test_there_are_recordings()


def test_another_folder(tmp_path: Path) -> None:
    """A folder of other names is run file by file, each is reported, and what can't be run fails."""
    shutil.copy(GOLDEN / "env_limit_public.npz", tmp_path / "env_some_word.npz")
    shutil.copy(GOLDEN / "learner_vdn_public_1.npz", tmp_path / "learner_vdn_w_7.npz")
    shutil.copy(GOLDEN / "learner_vdn_public_1.npz", tmp_path / "learner_dqn_word_0.npz")
    (tmp_path / "README.md").touch()
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/parity/test_parity.py", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"WQMIX_PARITY_DIR": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    for line in (
        "env_some_word.npz: init (obs, state, avail); step (post_agents_pos",
        "learner_vdn_w_7.npz: expected (mask, chosen_action_qvals",
        "    float64: largest error ",
        "    float64-blocks: largest error ",
        "    float32: largest error ",
        "test_recording[learner_dqn_word_0-float64] - tests.parity.learner_cases.CannotRun: its case is unknown",
        "3 failed, 5 passed",
    ):
        assert line in result.stdout


@pytest.mark.parametrize(
    ("tolerance", "passes"),
    [
        (EXACT, False),
        (Tolerance(absolute=0.011), True),
        (Tolerance(absolute=0.009), False),
        (Tolerance(relative=0.011), True),
        (Tolerance(relative=0.009), False),
        (Tolerance(relative_to_largest=0.0011), True),
        (Tolerance(relative_to_largest=0.0009), False),
    ],
)
def test_a_tolerance_is_kept(tolerance: Tolerance, passes: bool) -> None:
    report = Report()
    report.compare("group/name", np.array([1.01, -10.0]), np.array([1.0, -10.0]), tolerance)
    assert (report.failures == []) == passes
    assert report.worst == pytest.approx(Tolerance(0.01, 0.01, 0.001))


@pytest.mark.parametrize("got", [np.array([1.0, np.nan]), np.array([1.0]), np.array([1.0, np.inf])])
def test_what_is_no_number_or_of_another_shape_differs(got: np.ndarray) -> None:
    report = Report()
    report.compare("group/name", got, np.array([1.0, 2.0]), Tolerance(1.0, 1.0, 1.0))
    assert len(report.failures) == 1


def _missed(each: Ran) -> list[str]:
    """The recorded tensors of which a changed entry goes unseen, or is seen as something else."""
    arrays, missed = each.file.arrays, []
    groups = ("expected", "trace", "grads", "after1", "after5")
    for name in (name for name in arrays if name.split("/")[0] in groups):
        [seen] = each.compare(arrays | {name: _perturbed(arrays[name], arrays["expected/mask"])}).failures or [""]
        if not seen.startswith(name):
            missed.append(name)
    return missed


def _perturbed(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One entry that counts: of what is recorded per step, one of a real step."""
    changed = array.copy()
    weight = np.abs(changed.astype(np.float64)) + 1.0
    if changed.ndim >= 3 and changed.shape[:1] == mask.shape[:1]:
        weight[:, 1:] = 0  # the first step of an episode is always real
        weight[weight > 1e6] = 0  # the mark of an unavailable action
    largest = np.unravel_index(weight.argmax(), changed.shape)
    if changed.dtype == bool:
        changed[largest] ^= True
    elif np.issubdtype(changed.dtype, np.integer):
        changed[largest] += 1
    else:
        changed[largest] *= 1 + 1e-6
    return changed


def _tie(each: Ran, other_side: str, candidates: np.ndarray) -> dict[str, np.ndarray]:
    """The recording with a reward that makes the target of one last step equal to ``other_side``, to the bit.

    What is recorded of it are the weights alone, with alpha at the tie.
    """
    arrays = each.file.arrays
    last = arrays["batch/terminated"][:, :-1, 0] > 0
    episode, step = np.argwhere(last & candidates)[0]
    reward = arrays["batch/reward"].astype(np.float64)
    reward[episode, step] = each.ran.values[other_side][episode, step]
    weights = arrays["expected/ws"].copy()
    weights[episode, step] = each.file.config["w"]
    kept = {name: array for name, array in arrays.items() if name.split("/")[0] in ("params", "target", "batch")}
    return kept | {"batch/reward": reward, "expected/ws": weights}


def _groups_that_differ(name: str) -> set[str]:
    file = harness.load(GOLDEN / f"{name}.npz")
    case = learner_case(file.path, file.config)
    report = learner_cases.compare(case, file.arrays, file.config, "float64")
    return {failure.split("/")[0] for failure in report.failures}
