"""An environment that breaks its contract is refused in one line before anything is compiled."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests import running
from tests.environments import Clock, Leaver, Recall
from wqmix_jax import load_config, train_seeds
from wqmix_jax.api import load_policies
from wqmix_jax.config import load_group
from wqmix_jax.envs import checks
from wqmix_jax.envs.base import Environment, ExternalPackage
from wqmix_jax.envs.checks import check_environment
from wqmix_jax.envs.predator_prey import PredatorPrey
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build
from wqmix_jax.types import Observation


def changed(**members: Any) -> Environment:
    """Returns `Recall` (two agents with two actions and features each, three state features) with other members."""
    return type("Changed", (Recall,), members)()


def with_spec(**sizes: int) -> Environment:
    return changed(spec=property(lambda self: Recall().spec._replace(**sizes)))


def with_seen(**changes: Any) -> Environment:
    """Returns an environment whose observation has other leaves, each a function of the right one."""

    def observe(self: Any, env_state: Any) -> Observation:
        seen = Recall().observe(env_state)
        return seen._replace(**{name: change(getattr(seen, name)) for name, change in changes.items()})

    return changed(observe=observe)


def with_outcome(**changes: Any) -> Environment:
    def step(self: Any, *args: Any) -> Any:
        env_state, outcome = Recall().step(*args)
        return env_state, outcome._replace(**changes)

    return changed(step=step)


def with_metrics(**metrics: Any) -> Environment:
    return changed(metrics=lambda self, env_state: metrics)


def with_decompressed(**leaves: Any) -> Environment:
    return changed(decompress=lambda self, compressed: Recall().decompress(compressed)._replace(**leaves))


def raising(*_: Any) -> Any:
    raise ValueError("the coin rolled away\nand more")


KEY = jax.random.key(0)
UNFIT: list[tuple[str, Any, str]] = [
    ("obs_dim", with_spec(obs_dim=5), r"observe returns obs of float32\[2, 2\], but float32\[2, 5\] .*spec.obs_dim=5"),
    (
        "state_dim",
        with_spec(state_dim=2),
        r"observe returns state of float32\[3\], but float32\[2\] .*spec.state_dim=2",
    ),
    ("num_actions", with_spec(num_actions=3), r"avail_actions of bool\[2, 2\], but bool\[2, 3\] .*spec.num_actions=3"),
    (
        "num_agents",
        with_spec(num_agents=3),
        r"obs of float32\[2, 2\], but float32\[3, 2\] is needed, spec.num_agents=3",
    ),
    ("no steps", with_spec(episode_limit=0), r"spec.episode_limit=0; return a positive integer"),
    ("half a step", with_spec(episode_limit=2.5), r"spec.episode_limit=2.5; return a positive integer"),  # type: ignore
    ("no spec", changed(spec=property(lambda self: (2, 2))), r"spec is a tuple; return a wqmix_jax.types.EnvSpec"),
    ("keys seen", with_seen(obs=lambda obs: KEY), r"obs of key<fry>\[\], but float32\[2, 2\] is needed"),
    ("avail", with_seen(avail_actions=lambda a: a.astype(jnp.float32)), r"avail_actions of float32\[2, 2\], but bool"),
    ("a tuple", changed(observe=lambda self, env_state: (1, 2)), r"observe returns tuple; return a .*Observation"),
    ("reward", with_outcome(reward=jnp.zeros(2)), r"step returns reward of float32\[2\], but float32\[\] is needed"),
    (
        "ends",
        with_outcome(terminated=jnp.float32(0)),
        r"step returns terminated of float32\[\], but bool\[\] is needed",
    ),
    ("no pair", changed(step=lambda self, *args: args[0]), r"step returns RecallState; return a pair"),
    (
        "state",
        changed(step=lambda self, s, *args: (s._replace(steps=s.steps + 0.5), Recall().step(s, *args)[1])),
        r"step returns the state's steps of float32\[\], but reset returns it of int32\[\]",
    ),
    (
        "structure",
        changed(step=lambda self, s, *args: (tuple(s), Recall().step(s, *args)[1])),
        r"step returns a state of another structure than reset",
    ),
    ("transition", changed(transition=lambda self, *args: args[0]), r"transition returns RecallState; return a pair"),
    (
        "noise",
        changed(transition=raising, sample_noise=raising),
        r"sample_noise raises ValueError: the coin rolled away",
    ),
    ("metrics", with_metrics(won=jnp.zeros(2)), r"metrics returns 'won' of float32\[2\], but a scalar is needed"),
    ("taken", with_metrics(episode_return=jnp.float32(0)), r"'episode_return', which every record has already"),
    ("decompress", with_decompressed(state=jnp.zeros(7)), "decompress returns state of"),
    ("keys", changed(compress=lambda self, env_state: {"key": KEY}), r"compress returns key of key<fry>\[\], but int"),
    ("error", changed(reset=raising), r"reset raises ValueError: the coin rolled away \(.*test_checks.py, line \d+\)$"),
    ("in spec", changed(spec=property(raising)), r"spec raises ValueError: the coin rolled away"),
]


@pytest.mark.parametrize(("env", "message"), [(env, text) for _, env, text in UNFIT], ids=[name for name, *_ in UNFIT])
def test_an_environment_that_does_not_fit_its_spec_is_refused(env: Environment, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^env=Changed is not allowed: .*{message}") as refused:
        check_environment(env)
    assert "\n" not in str(refused.value)


class Halves(Clock):
    """An environment whose feature is the time in halves, stored as bytes."""

    def observe(self, env_state: Any) -> Observation:
        seen = super().observe(env_state)
        return seen._replace(obs=seen.obs / 2, state=jnp.abs(seen.state))

    @property
    def storage_dtype(self) -> Any:
        return jnp.int8


class Wholes(Clock):
    @property
    def storage_dtype(self) -> Any:
        return jnp.int8


def test_a_feature_that_the_replay_would_lose_is_refused() -> None:
    message = r"^env=Halves is not allowed: obs\[0, 1\] is 0.5 after 0 steps, but 0.0 after compress and decompress; "
    with pytest.raises(ConfigError, match=f"{message}.*=int8 can't"):
        check_environment(Halves(episode_limit=4, ends_from=9))
    check_environment(Wholes(episode_limit=4, ends_from=9))


def test_a_decompress_that_is_no_inverse_is_refused() -> None:
    """The second action is never available at the first step; here it comes back as available."""
    everything = jnp.ones((2, 2), bool)
    message = r"avail_actions\[0, 1\] is False after 0 steps, but True after compress and decompress; decompress must"
    with pytest.raises(ConfigError, match=message):
        check_environment(with_decompressed(avail_actions=everything))


@pytest.mark.parametrize(
    ("former", "member", "name"),
    [
        ("pack", lambda self, env_state: env_state, "compress"),
        ("unpack", lambda self, packed: packed, "decompress"),
        ("host", property(lambda self: ExternalPackage("jax")), "external"),
        ("host", functools.cached_property(lambda self: ExternalPackage("jax")), "external"),
    ],
    ids=["pack", "unpack", "host", "cached host"],
)
def test_an_override_of_a_former_name_is_refused(former: str, member: Any, name: str) -> None:
    """Otherwise it would be ignored: the trainer calls only the new name."""
    message = f"env=Changed is not allowed: it defines {former}, which is called {name} now; rename it to {name}"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_environment(changed(**{former: member}))


@pytest.mark.parametrize("name", ["no_such_module:Viewer", "wqmix_jax.envs.viewer:NoSuchViewer", "no name"])
def test_a_viewer_that_cannot_be_imported_is_refused_in_one_line(name: str) -> None:
    assert changed().viewer() is None
    with pytest.raises(ConfigError, match=f"^Changed.viewer_class='{name}' can't be imported: .+$"):
        changed(viewer_class=name).viewer()


def test_an_option_may_have_a_former_name() -> None:
    check_environment(changed(host="localhost"))


@pytest.mark.parametrize("name", ["predator_prey", "matrix_game", "mmdp", "jumanji"])
def test_this_packages_environments_fit(name: str) -> None:
    check_environment(build("env", load_group("env", name)))


def test_the_tests_own_environments_fit() -> None:
    check_environment(Leaver(episode_limit=4, ends_from=9))
    check_environment(Recall())


def test_a_command_refuses_it_before_it_writes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = running.copy_user_folder(tmp_path / "mine")
    coin = folder / "coin.py"
    wrong = coin.read_text().replace("num_actions=2, obs_dim=2", "num_actions=2, obs_dim=3")
    (folder / "wrong_coin.py").write_text(wrong)
    yaml = (folder / "configs" / "env" / "coin.yaml").read_text().replace("coin.Coin", "wrong_coin.Coin")
    (folder / "configs" / "env" / "wrong_coin.yaml").write_text(yaml)
    run_dir = tmp_path / "run"
    code = running.main(*running.TINY, "env=wrong_coin", f"run_dir={run_dir}", config_dir=folder / "configs")
    err = capsys.readouterr().err.splitlines()
    assert code == 2
    assert err == [
        "error: env=Coin is not allowed: observe returns obs of float32[2, 2], but float32[2, 3] is needed, "
        "spec.num_agents=2, spec.obs_dim=3"
    ]
    assert not run_dir.exists()


def test_a_run_whose_environment_has_changed_since_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_policies` serves `load_policy` and `evaluate`; training without a folder refuses it too."""
    kept = running.ROOT / "experiments" / "results" / "predator_prey" / "epsilon_1M" / "qmix" / "seeds_0-1"
    monkeypatch.setattr(PredatorPrey, "_local_views", lambda self, env_state: jnp.zeros((3, 7)))
    message = r"env=PredatorPrey is not allowed: observe returns obs of float32\[3, 7\], but float32\[8, 75\] is needed"
    with pytest.raises(ConfigError, match=message):
        load_policies(kept)
    with pytest.raises(ConfigError, match=message):
        train_seeds(load_config("+algo=iql", "env=predator_prey"), [0])


@pytest.mark.parametrize("dtype", ["int32", "bool", "bfloat16"])
def test_observations_of_other_numbers_are_accepted(dtype: str) -> None:
    """They are converted to float32, as the replay stores them."""
    check_environment(with_seen(obs=lambda obs: jnp.zeros_like(obs, dtype)))


def test_a_state_of_a_narrower_dtype_is_accepted() -> None:
    """A loop promotes it to the dtype of the first state."""
    assert checks._becomes(jnp.dtype("int8"), jnp.dtype("int32"))
    assert not checks._becomes(jnp.dtype("int32"), jnp.dtype("int8"))
    assert not checks._becomes(KEY.dtype, jnp.dtype("int32"))


def test_the_games_of_packages_are_compressed_and_decompressed() -> None:
    """A custom environment may record its package's version; its storage may still lose features."""
    external = property(lambda self: ExternalPackage("jax"))
    env = changed(storage_dtype=property(lambda self: jnp.uint8), external=external)
    assert checks._stores_its_own_way(env)
