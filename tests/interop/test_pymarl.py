"""PyMARL's checkpoints, written and read by the real torch."""

import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wqmix_jax import load_config
from wqmix_jax.algos.base import AgentInputs, Algorithm
from wqmix_jax.interop.pymarl import (
    PyMARLError,
    agent_options,
    from_pymarl,
    load_checkpoint,
    save_checkpoint,
    to_pymarl,
)
from wqmix_jax.networks.agent import RecurrentAgent
from wqmix_jax.types import EnvSpec, PyTree

SPEC = EnvSpec(num_agents=3, num_actions=5, obs_dim=7, state_dim=11, episode_limit=9)
INPUTS = SPEC.obs_dim + SPEC.num_actions + SPEC.num_agents
SIZES = ("algo.hidden_dim=16", "algo.mixer_embed_dim=8", "algo.hypernet_dim=12", "algo.q_star_dim=20")


class TorchAgent(torch.nn.Module):
    """The recurrent agent of PyMARL, written from its description."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(INPUTS, 16)
        self.rnn = torch.nn.GRUCell(16, 16)
        self.fc2 = torch.nn.Linear(16, SPEC.num_actions)

    def forward(self, inputs: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.rnn(torch.relu(self.fc1(inputs)), hidden)
        return self.fc2(hidden), hidden


class TorchEPyMARL(torch.nn.Module):
    """EPyMARL's agent with its ``use_rnn``, written from its description."""

    def __init__(self, num_inputs: int, *, use_rnn: bool) -> None:
        super().__init__()
        self.use_rnn = use_rnn
        self.fc1 = torch.nn.Linear(num_inputs, 16)
        self.rnn = torch.nn.GRUCell(16, 16) if use_rnn else torch.nn.Linear(16, 16)
        self.fc2 = torch.nn.Linear(16, SPEC.num_actions)

    def forward(self, inputs: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = torch.relu(self.fc1(inputs))
        hidden = self.rnn(encoded, hidden) if self.use_rnn else torch.relu(self.rnn(encoded))
        return self.fc2(hidden), hidden


class TorchSeparate(torch.nn.Module):
    """EPyMARL's agents without shared parameters."""

    def __init__(self, agents: list[TorchEPyMARL]) -> None:
        super().__init__()
        self.agents = torch.nn.ModuleList(agents)


class TorchMixer(torch.nn.Module):
    """QMIX's mixer in PyMARL's form, only its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper_w_1 = two_layers(SPEC.state_dim, 12, 8 * SPEC.num_agents)
        self.hyper_w_final = two_layers(SPEC.state_dim, 12, 8)
        self.hyper_b_1 = torch.nn.Linear(SPEC.state_dim, 8)
        self.V = two_layers(SPEC.state_dim, 8, 1)


class TorchCentralMixer(torch.nn.Module):
    """The authors' unrestricted mixer, only its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(SPEC.num_agents + SPEC.state_dim, 20, 20, 20, 1)
        self.V = two_layers(SPEC.state_dim, 20, 1)


class TorchAttention(torch.nn.Module):
    """The authors' attention mixer of Q*, only its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.atten_layer = two_layers(SPEC.state_dim, 12, 20 * SPEC.num_agents)
        self.net = layers(20, 20, 20, 1)
        self.V = two_layers(SPEC.state_dim, 20, 1)


class TorchQTRAN(torch.nn.Module):
    """QTRAN-base's joint network, only its layers."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        pair = 16 + SPEC.num_actions
        self.Q = layers(SPEC.state_dim + pair, *[8] * num_layers, 1)
        self.V = layers(SPEC.state_dim, *[8] * num_layers, 1)
        self.action_encoding = two_layers(pair, pair, pair)


class TorchQPLEX(torch.nn.Module):
    """QPLEX's mixer, only its layers."""

    def __init__(self) -> None:
        super().__init__()
        agents, actions = SPEC.num_agents, SPEC.num_agents * SPEC.num_actions
        self.hyper_w_final = two_layers(SPEC.state_dim, 12, agents)
        self.V = two_layers(SPEC.state_dim, 12, agents)
        self.si_weight = torch.nn.Module()
        inputs = {"key": (SPEC.state_dim, 1), "agents": (SPEC.state_dim, agents)}
        inputs["action"] = (SPEC.state_dim + actions, agents)
        for name, (features, outputs) in inputs.items():
            heads = torch.nn.ModuleList(layers(features, 10, 10, outputs) for _ in range(11))
            self.si_weight.add_module(f"{name}_extractors", heads)


TORCH = {"agent": TorchAgent, "mixer": TorchMixer, "central_agent": TorchAgent, "central_mixer": TorchCentralMixer}


def two_layers(inputs: int, hidden: int, outputs: int) -> torch.nn.Sequential:
    return layers(inputs, hidden, outputs)


def layers(*sizes: int) -> torch.nn.Sequential:
    """Linear layers with ReLUs between them."""
    each = [(torch.nn.Linear(*pair), torch.nn.ReLU()) for pair in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*itertools.chain.from_iterable(each))[:-1]


@pytest.fixture(scope="module")
def algo() -> Algorithm:
    return load_config("+algo=ow_qmix", *SIZES).algo


@pytest.fixture(scope="module")
def params(algo: Algorithm) -> PyTree:
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes(algo))


def shapes(algo: Algorithm) -> PyTree:
    return jax.eval_shape(lambda: algo.init(jax.random.key(0), SPEC))


def write(folder: Path, net: str, state_dict: Mapping[str, Any]) -> None:
    torch.save(state_dict, folder / f"{net}.th")


def read(folder: Path, net: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{net}.th", weights_only=True)


def bits(tree: PyTree) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.int32).tolist(), tree)


def test_what_torch_wrote_comes_back_bit_for_bit(tmp_path: Path, params: PyTree) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    modules = {net: make() for net, make in TORCH.items()}
    with torch.no_grad():
        modules["agent"].fc1.bias[:3] = torch.tensor([-0.0, float("nan"), 1e-42])
    for net, module in modules.items():
        write(first, net, module.state_dict())
    loaded = load_checkpoint(first, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    save_checkpoint(second, loaded)
    for net, module in modules.items():
        again = read(second, net)
        assert sorted(again) == sorted(module.state_dict())
        for name, tensor in module.state_dict().items():
            assert again[name].dtype == torch.float32
            assert torch.equal(again[name].view(torch.int32), tensor.view(torch.int32))
        make = TORCH[net]()
        make.load_state_dict(again)  # as PyMARL does; strict


@pytest.mark.parametrize(
    ("options", "net", "make"),
    [
        (["+algo=cw_qmix", *SIZES, "algo.q_star=attention"], "central_mixer", TorchAttention),
        (["+algo=qtran", "algo.mixer_embed_dim=8", "algo.mixer_layers=2"], "mixer", lambda: TorchQTRAN(2)),
        (["+algo=qtran", "algo.mixer_embed_dim=8", "algo.mixer_layers=3"], "mixer", lambda: TorchQTRAN(3)),
        (
            ["+algo=qplex", "algo.hypernet_dim=12", "algo.attention_dim=10", "algo.num_heads=11"],
            "mixer",
            TorchQPLEX,
        ),
    ],
    ids=["attention", "qtran", "big qtran", "qplex"],
)
def test_every_mixer_comes_back_bit_for_bit(tmp_path: Path, options: list[str], net: str, make: Any) -> None:
    first, second, module = tmp_path / "first", tmp_path / "second", make()
    first.mkdir()
    write(first, net, module.state_dict())
    params = shapes(load_config(*options, "algo.hidden_dim=16").algo)
    loaded = load_checkpoint(first, params, nets=[net])
    [ours] = loaded
    assert jax.tree.structure(loaded[ours]) == jax.tree.structure(params[ours])
    save_checkpoint(second, loaded)
    again = read(second, net)
    assert again.keys() == module.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in module.state_dict().items())


def test_heads_are_stacked_in_torchs_order(tmp_path: Path) -> None:
    """The eleventh is after the tenth, not after the first; one missing or of another shape is named."""
    sizes = ("algo.hypernet_dim=12", "algo.attention_dim=10", "algo.num_heads=11")
    params = shapes(load_config("+algo=qplex", *sizes).algo)
    tensors = TorchQPLEX().state_dict()
    write(tmp_path, "mixer", tensors)
    loaded = load_checkpoint(tmp_path, params, nets=["mixer"])["mixer"]
    stacked = loaded["si_weight"]["action_extractors"]["layer_1"]["kernel"]
    for head in range(11):
        np.testing.assert_array_equal(stacked[head], tensors[f"si_weight.action_extractors.{head}.2.weight"].T)
    name = "si_weight.key_extractors.7.4.bias"
    write(tmp_path, "mixer", tensors | {name: torch.zeros(2)})
    with pytest.raises(PyMARLError, match=r"key_extractors\.7\.4\.bias has shape \(2,\), expected is \(1,\)"):
        load_checkpoint(tmp_path, params, nets=["mixer"])
    write(tmp_path, "mixer", {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(PyMARLError, match=r"key_extractors\.7\.4\.bias is missing"):
        load_checkpoint(tmp_path, params, nets=["mixer"])


def test_what_we_wrote_comes_back_bit_for_bit(tmp_path: Path, params: PyTree) -> None:
    save_checkpoint(tmp_path, params)
    loaded = load_checkpoint(tmp_path, jax.eval_shape(lambda: params))
    assert bits(loaded) == bits(params)
    every = {"hidden_dim": 16, "recurrent": True, "share_parameters": "all", "agent_id": True, "last_action": True}
    assert agent_options(tmp_path, SPEC) == every


def test_a_loaded_agent_computes_what_torchs_does(tmp_path: Path, params: PyTree) -> None:
    """So that no two tensors of one shape have changed places, nor two gates."""
    theirs = TorchAgent()
    write(tmp_path, "agent", theirs.state_dict())
    ours = load_checkpoint(tmp_path, params, nets=["agent"])["agent"]
    inputs = np.random.default_rng(0).normal(size=(4, 6, INPUTS)).astype(np.float32)
    hidden, expected = torch.zeros(6, 16), []
    with torch.no_grad():
        for step in inputs:
            utilities, hidden = theirs(torch.from_numpy(step), hidden)
            expected.append(utilities.numpy())
    _, got = RecurrentAgent(16, SPEC.num_actions).apply({"params": ours}, jnp.zeros((6, 16)), jnp.asarray(inputs))
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rnn", [True, False])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(("agent_id", "last_action"), [(True, True), (True, False), (False, True), (False, False)])
def test_epymarls_agents_compute_what_torchs_do(
    tmp_path: Path, use_rnn: bool, is_shared: bool, agent_id: bool, last_action: bool
) -> None:
    """Their options follow from the file, which is written again with the same tensors."""
    num_inputs = SPEC.obs_dim + agent_id * SPEC.num_agents + last_action * SPEC.num_actions
    agents = [TorchEPyMARL(num_inputs, use_rnn=use_rnn) for _ in range(1 if is_shared else SPEC.num_agents)]
    theirs = agents[0] if is_shared else TorchSeparate(agents)
    write(tmp_path, "agent", theirs.state_dict())
    options = agent_options(tmp_path, SPEC)
    sharing = "all" if is_shared else "none"
    expected = {"hidden_dim": 16, "recurrent": use_rnn, "share_parameters": sharing}
    assert options == expected | {"agent_id": agent_id, "last_action": last_action}
    algo = dataclasses.replace(load_config("+algo=iql").algo, **options)
    ours = load_checkpoint(tmp_path, shapes(algo), nets=["agent"])

    rng, carry, hidden = np.random.default_rng(0), jnp.zeros((3, 16)), [torch.zeros(1, 16)] * 3
    for last in (-1, 2):
        obs = rng.normal(size=(3, SPEC.obs_dim)).astype(np.float32)
        seen = AgentInputs(jnp.asarray(obs), jnp.full(3, last), jnp.ones((3, SPEC.num_actions), bool))
        carry, found = algo.step(ours["agent"], carry, seen)
        for agent in range(3):
            net = agents[agent % len(agents)]
            action = np.zeros(SPEC.num_actions) if last < 0 else np.eye(SPEC.num_actions)[last]
            parts = [obs[agent]] + [action] * last_action + [np.eye(3)[agent]] * agent_id
            inputs = torch.from_numpy(np.concatenate(parts).astype(np.float32)[None])
            with torch.no_grad():
                utilities, hidden[agent] = net(inputs, hidden[agent])
            np.testing.assert_allclose(found[agent], utilities[0], rtol=1e-5, atol=1e-6)

    again = tmp_path / "again"
    save_checkpoint(again, ours)
    assert bits(dict(sorted(read(again, "agent").items()))) == bits(dict(sorted(theirs.state_dict().items())))


def test_agents_without_a_counterpart_are_refused(tmp_path: Path) -> None:
    for option, leaf in {"share_parameters": "groups/encoder/bias", "layer_norm": "encoder_norm/bias"}.items():
        value = {"share_parameters": ((0, 1), (2,)), "layer_norm": True}[option]
        algo = dataclasses.replace(load_config("+algo=vdn").algo, **{option: value})
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(algo))
        with pytest.raises(PyMARLError, match=f"^agent/{leaf} has no name in PyMARL's agent$"):
            save_checkpoint(tmp_path, params)


def test_a_file_without_an_agent_of_a_known_kind_is_named(tmp_path: Path) -> None:
    write(tmp_path, "agent", {"fc1.weight": torch.zeros(4, 9), "rnn.weight": torch.zeros(4)})
    with pytest.raises(PyMARLError, match=r"agent\.th: rnn\.weight has shape \(4,\)$"):
        agent_options(tmp_path, SPEC)
    write(tmp_path, "agent", {"agents.0.fc1.weight": torch.zeros(4, 9)})
    with pytest.raises(PyMARLError, match=r"agent\.th: agents\.0\.rnn\.weight_hh is missing$"):
        agent_options(tmp_path, SPEC)


def test_inputs_are_left_open_where_two_choices_have_the_same_width(tmp_path: Path) -> None:
    spec = SPEC._replace(num_actions=SPEC.num_agents)
    write(tmp_path, "agent", TorchEPyMARL(spec.obs_dim + 3, use_rnn=True).state_dict())
    assert agent_options(tmp_path, spec).keys() == {"hidden_dim", "recurrent", "share_parameters"}


def test_the_authors_learners_leave_the_central_nets_out(tmp_path: Path, params: PyTree) -> None:
    for net in ("agent", "mixer"):
        write(tmp_path, net, TORCH[net]().state_dict())
    write(tmp_path, "opt", {"state": {}})
    loaded = load_checkpoint(tmp_path, params)
    assert set(loaded) == {"agent", "mixer"}


def test_vdns_mixer_is_empty(tmp_path: Path) -> None:
    algo = load_config("+algo=vdn", "algo.hidden_dim=16").algo
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), shapes(algo))
    save_checkpoint(tmp_path, params)
    assert read(tmp_path, "mixer") == {}
    assert bits(load_checkpoint(tmp_path, params)) == bits(params)


@pytest.mark.parametrize(
    ("net", "change", "message"),
    [
        ("agent", {"fc2.bias": None}, "agent.th: fc2.bias is missing"),
        ("agent", {"fc3.bias": torch.zeros(5)}, "agent.th: fc3.bias is not expected"),
        ("agent", {"fc1.weight": torch.zeros(16, 9)}, "agent.th: fc1.weight has shape (16, 9), expected is (16, 15)"),
        ("agent", {"fc1.bias": torch.zeros(16, 1)}, "agent.th: fc1.bias has shape (16, 1), expected is (16,)"),
        (
            "agent",
            {"fc1.bias": torch.zeros(16).double()},
            "fc1.bias is torch.float64, expected is torch.float32",
        ),
        ("agent", {"fc1.bias": 3}, "agent.th: fc1.bias is int, expected is torch.float32"),
        ("mixer", {"V.2.weight": None}, "mixer.th: V.2.weight is missing"),
        (
            "central_mixer",
            {"net.6.bias": torch.zeros(2)},
            "net.6.bias has shape (2,), expected is (1,)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, params: PyTree, net: str, change: dict[str, Any], message: str
) -> None:
    for each, make in TORCH.items():
        write(tmp_path, each, make().state_dict())
    changed = read(tmp_path, net) | change
    write(tmp_path, net, {name: tensor for name, tensor in changed.items() if tensor is not None})
    with pytest.raises(PyMARLError) as caught:
        load_checkpoint(tmp_path, params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_net_too_many_or_too_few_is_named(tmp_path: Path, params: PyTree) -> None:
    with pytest.raises(PyMARLError, match=r"agent\.th is not there$"):
        load_checkpoint(tmp_path, params)
    write(tmp_path, "agent", TorchAgent().state_dict())
    with pytest.raises(PyMARLError, match=r"mixer\.th is not there$"):
        load_checkpoint(tmp_path, params)
    write(tmp_path, "mixer", TorchMixer().state_dict())
    write(tmp_path, "central_agent", TorchAgent().state_dict())
    qmix = {net: params[net] for net in ("agent", "mixer")}
    with pytest.raises(PyMARLError, match=r"central_agent\.th: fc1\.weight is not expected"):
        load_checkpoint(tmp_path, qmix)
    with pytest.raises(PyMARLError, match="judge is none of PyMARL's nets"):
        save_checkpoint(tmp_path, {"judge": {}})
    with pytest.raises(PyMARLError, match=r"agent/extra/bias has no name in PyMARL's agent"):
        to_pymarl("agent", params["agent"] | {"extra": {"bias": jnp.zeros(1)}})


def test_the_folder_of_a_whole_run_is_told_apart(tmp_path: Path, params: PyTree) -> None:
    (tmp_path / "1000054").mkdir()
    write(tmp_path / "1000054", "agent", TorchAgent().state_dict())
    with pytest.raises(PyMARLError, match=r"agent\.th is not there; name one of its folders instead, .*1000054"):
        load_checkpoint(tmp_path, params)


class Trap:
    """A pickle of this makes a folder when it is opened as pickles are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_code_in_a_file_is_not_run(tmp_path: Path, params: PyTree) -> None:
    write(tmp_path, "agent", {"fc1.weight": Trap(tmp_path / "sprung")})
    with pytest.raises(PyMARLError, match=r"agent\.th can't be read"):
        load_checkpoint(tmp_path, params)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no zip archive", b"hello", b"PK\x03\x04broken"])
def test_a_broken_file_is_named(tmp_path: Path, params: PyTree, content: bytes) -> None:
    (tmp_path / "agent.th").write_bytes(content)
    with pytest.raises(PyMARLError, match=r"agent\.th can't be read"):
        load_checkpoint(tmp_path, params)


def test_a_file_that_holds_something_else_is_named(tmp_path: Path, params: PyTree) -> None:
    torch.save(torch.zeros(3), tmp_path / "agent.th")
    with pytest.raises(PyMARLError, match="holds a Tensor, expected is a state_dict"):
        load_checkpoint(tmp_path, params)


def test_without_torch_the_extra_is_named(tmp_path: Path, params: PyTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PyMARLError, match=r"PyMARL's checkpoints need torch: .*torch"):
        load_checkpoint(tmp_path, params)


def test_names_and_layout(params: PyTree) -> None:
    """Torch's matrices are ``[outputs, inputs]``, ours the other way round."""
    tensors = to_pymarl("agent", params["agent"])
    np.testing.assert_array_equal(tensors["rnn.weight_hh"], np.asarray(params["agent"]["gru"]["hidden_kernel"]).T)
    assert tensors["fc1.weight"].shape == (16, INPUTS)
    assert bits(from_pymarl("agent", tensors, params["agent"])) == bits(params["agent"])
