"""Converts PyMARL's checkpoints to our parameter trees and back, bit for bit.

A PyMARL learner saves one ``state_dict`` per net into a folder: ``agent.th`` and, with a mixer, ``mixer.th``. The
authors' WQMIX learners leave the central nets out; forks that save them call the files ``central_agent.th`` and
``central_mixer.th``, and so do we. The optimiser's ``opt.th`` is not read. `NETS` is the one table of names.

EPyMARL's agents without a recurrent unit (``use_rnn: False``) and without shared parameters (``rnn_ns``) are read, too.
Agents with layer normalisation, and groups of agents that share parameters, have no counterpart there.
"""

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from wqmix_jax.errors import install_extra
from wqmix_jax.types import EnvSpec, PyTree


class PyMARLError(ValueError):
    """A checkpoint that can't be read or doesn't fit; the message is one line that names the file and the tensor."""


class Net(NamedTuple):
    """One of PyMARL's nets.

    Attributes:
        ours: its key in our parameters.
        layouts: for each possible architecture a mapping from torch's name of a tensor to the path of our leaf.
            Matrices are transposed. A ``*`` is the index in a list of layers, whose tensors are stacked in our leaf.
        optional: whether a checkpoint may lack it.
    """

    ours: str
    layouts: tuple[Mapping[str, str], ...]
    optional: bool


class _Place(NamedTuple):
    """The place of one of torch's tensors in our leaves: ``stacked`` is empty, or the index in a stack."""

    path: str
    stacked: tuple[int, ...]


def _linear(**layers: str) -> dict[str, str]:
    """Returns weight and bias of linear layers: our path (``__`` for ``/``) = torch's name."""
    ours = {path.replace("__", "/"): name for path, name in layers.items()}
    return {
        f"{name}.{theirs}": f"{path}/{leaf}"
        for path, name in ours.items()
        for theirs, leaf in (("weight", "kernel"), ("bias", "bias"))
    }


def _layers(ours: str, theirs: str, count: int) -> dict[str, str]:
    """Returns linear layers with ReLUs between them, which torch counts as well."""
    return _linear(**{f"{ours}/layer_{layer}": f"{theirs}.{2 * layer}" for layer in range(count)})


_V = _linear(v__hidden="V.0", v__out="V.2")
_AGENT = _linear(encoder="fc1", head="fc2") | {
    "rnn.weight_ih": "gru/input_kernel",
    "rnn.weight_hh": "gru/hidden_kernel",
    "rnn.bias_ih": "gru/input_bias",
    "rnn.bias_hh": "gru/hidden_bias",
}
# EPyMARL's agents without a recurrent unit, and its agents without shared parameters.
_FEED_FORWARD = _linear(encoder="fc1", hidden="rnn", head="fc2")
_AGENTS = tuple(
    {f"agents.*.{theirs}": f"agents/{ours}" for theirs, ours in layout.items()} for layout in (_AGENT, _FEED_FORWARD)
)
# MAVEN's agents, whose ``fc2`` is idle there as our ``head`` is.
_LATENT_AGENT = _AGENT | _linear(latent_head__hypernet="hyper_noise_fc1")
_AGENT_LAYOUTS = (_AGENT, _FEED_FORWARD, *_AGENTS, _LATENT_AGENT)
_MIXER = _V | _linear(
    hyper_w_1__hidden="hyper_w_1.0",
    hyper_w_1__out="hyper_w_1.2",
    hyper_w_final__hidden="hyper_w_final.0",
    hyper_w_final__out="hyper_w_final.2",
    hyper_b_1="hyper_b_1",
)
_LINEAR_MIXER = _V | _linear(hyper_w_1="hyper_w_1", hyper_w_final="hyper_w_final", hyper_b_1="hyper_b_1")
_DISCRIMINATOR = _layers("mlp", "model", 9) | {
    f"rnn_agg.rnn.{theirs}": f"gru/{ours}"
    for theirs, ours in (
        ("weight_ih", "input_kernel"),
        ("weight_hh", "hidden_kernel"),
        ("bias_ih", "input_bias"),
        ("bias_hh", "hidden_bias"),
    )
}
_QTRAN = (
    _layers("q", "Q", 4)
    | _layers("v", "V", 4)
    | _linear(action_encoding__hidden="action_encoding.0", action_encoding__out="action_encoding.2")
)
_QPLEX = (
    _V
    | _linear(hyper_w_final__hidden="hyper_w_final.0", hyper_w_final__out="hyper_w_final.2")
    | _layers("si_weight/key_extractors", "si_weight.key_extractors.*", 3)
    | _layers("si_weight/agents_extractors", "si_weight.agents_extractors.*", 3)
    | _layers("si_weight/action_extractors", "si_weight.action_extractors.*", 3)
)
_CENTRAL_MIXER = _V | _linear(
    attention__hidden="atten_layer.0",
    attention__out="atten_layer.2",
    net_0="net.0",
    net_1="net.2",
    net_2="net.4",
    net_3="net.6",
)
_LIIR_HEADS = _linear(r_in="fc3_r_in", v_ex="fc4")
_COMA_CRITIC = _linear(encoder="fc1", hidden="fc2", head="fc3")
_RECOGNIZER = (
    _layers("v", "V", 3)
    | _layers("hyper_w_1", "lambda_hypernet.hyper_w_1", 3)
    | _layers("hyper_w_final", "lambda_hypernet.hyper_w_final", 3)
)
_PAYOFFS = _linear(layer_0="0", layer_1="2", layer_2="4", layer_3="6")

NETS: Mapping[str, Net] = {
    "agent": Net("agent", _AGENT_LAYOUTS, optional=False),
    "mixer": Net("mixer", (_MIXER, _QTRAN, _QPLEX, _LINEAR_MIXER), optional=False),
    "central_agent": Net("q_star_agent", _AGENT_LAYOUTS, optional=True),
    "central_mixer": Net("q_star_mixer", (_CENTRAL_MIXER,), optional=True),
    "discrim": Net("discriminator", (_DISCRIMINATOR,), optional=True),
    "rest_agent": Net("residual_agent", _AGENT_LAYOUTS, optional=True),
    "rest_mixer": Net("residual_mixer", (_CENTRAL_MIXER,), optional=True),
    "proxy": Net("proxy", (_LIIR_HEADS,), optional=True),
    "critic": Net("critic", (_COMA_CRITIC,), optional=True),
    "recognizer": Net("recognizer", (_RECOGNIZER,), optional=True),
    "payoffs": Net("payoff", (_PAYOFFS,), optional=True),
    "state_value": Net("state_value", (_linear(hidden="0", out="2"),), optional=True),
}
"""The nets by PyMARL's names, which are also the names of the files (with ``.th``).

The last two are DCG's. Its authors' code keeps the agents' last layer, ``fc2`` in ``agent.th`` here, in
``utilities.th``.
"""


def from_pymarl(net: str, tensors: Mapping[str, np.ndarray], like: PyTree, *, source: str = "") -> PyTree:
    """Converts one net to our parameters.

    Args:
        net: a key of `NETS`.
        tensors: the tensors by torch's names.
        like: our parameters of that net, or anything with their shapes.
        source: the origin of the tensors, for messages.

    Returns:
        A tree like ``like`` of arrays in the tensors' own precision.

    Raises:
        PyMARLError: at the first tensor that is missing, unexpected or of another shape.
    """
    source = source or net
    leaves = _flatten(like)
    expected = _places(net, leaves)
    for name in expected:
        if name not in tensors:
            raise PyMARLError(f"{source}: {name} is missing")
    found: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, tensor in tensors.items():
        if name not in expected:
            raise PyMARLError(f"{source}: {name} is not expected (expected are {', '.join(expected) or 'no tensors'})")
        path, index = expected[name]
        shape = tuple(leaves[path].shape[len(index) :])
        if tensor.T.shape != shape:
            raise PyMARLError(f"{source}: {name} has shape {tensor.shape}, expected is {shape[::-1]}")
        found.setdefault(path, {})[index] = tensor.T
    return unflatten_dict({path: _stacked(tensors) for path, tensors in found.items()}, sep="/")


def to_pymarl(net: str, params: PyTree) -> dict[str, np.ndarray]:
    """Inverts `from_pymarl`.

    Raises:
        PyMARLError: if a leaf has no name in PyMARL.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in _flatten(params).items()}
    named = _layout(net, leaves).values()
    for path in leaves:
        if path not in named:
            raise PyMARLError(f"{NETS[net].ours}/{path} has no name in PyMARL's {net}")
    places = _places(net, leaves)
    return {name: np.ascontiguousarray(leaves[path][index].T) for name, (path, index) in places.items()}


def load_checkpoint(
    folder: str | Path, like: Mapping[str, PyTree], *, nets: Collection[str] | None = None
) -> dict[str, PyTree]:
    """Reads a PyMARL checkpoint.

    Args:
        folder: the folder that contains ``agent.th``.
        like: parameters as `Algorithm.init` returns them, or anything with their shapes.
        nets: the keys of `NETS` to read; by default all that have files, at least the agent and a mixer.

    Returns:
        The nets that were read, by our names. ``params | load_checkpoint(folder, params)`` replaces them.

    Raises:
        PyMARLError: if a file or a tensor is missing, unexpected or of another kind.
    """
    folder = Path(folder)
    wanted = _files_to_read(folder, like) if nets is None else nets
    loaded = {}
    for net in wanted:
        ours = NETS[net].ours
        arrays = from_pymarl(net, read_tensors(folder, net), like.get(ours, {}), source=str(folder / f"{net}.th"))
        loaded[ours] = jax.tree.map(jnp.array, arrays)
    return loaded


def save_checkpoint(folder: str | Path, params: Mapping[str, PyTree]) -> None:
    """Writes one file per net of ``params`` as PyMARL does, for its ``learner.load_models`` (without ``opt.th``).

    Raises:
        PyMARLError: if a net has no counterpart in PyMARL.
    """
    torch = _torch()
    names = {net.ours: name for name, net in NETS.items()}
    unknown = [ours for ours in params if ours not in names]
    if unknown:
        raise PyMARLError(f"{unknown[0]} is none of PyMARL's nets ({', '.join(names)} are)")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for ours, tree in params.items():
        tensors = to_pymarl(names[ours], tree)
        state_dict = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        torch.save(state_dict, Path(folder) / f"{names[ours]}.th")


def read_tensors(folder: str | Path, net: str) -> dict[str, np.ndarray]:
    """Reads the float32 tensors of ``FOLDER/NET.th`` by torch's names. No code in the file is run.

    Raises:
        PyMARLError: if the file is missing or is not a ``state_dict`` of float32 tensors.
    """
    torch = _torch()
    path = Path(folder) / f"{net}.th"
    if not path.is_file():
        raise PyMARLError(f"{path} is not there{_step_folders(Path(folder))}")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler may raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise PyMARLError(f"{path} can't be read: {reason[0]}") from None
    if not isinstance(state_dict, Mapping):
        raise PyMARLError(f"{path} holds a {type(state_dict).__name__}, expected is a state_dict")
    return {name: _as_numpy(torch, tensor, f"{path}: {name}") for name, tensor in state_dict.items()}


def agent_options(folder: str | Path, env_spec: EnvSpec) -> dict[str, Any]:
    """Returns the options of the agents in ``agent.th``, by their names in an algorithm.

    Args:
        folder: the folder that contains it.
        env_spec: the environment that they play. ``agent_id`` and ``last_action`` follow from the width of the inputs;
            they are left out where no width or more than one fits.

    Raises:
        PyMARLError: as `read_tensors`, or if it is another kind of agent.
    """
    tensors = read_tensors(folder, "agent")
    is_alone = "agents.0.fc1.weight" in tensors
    prefix = "agents.0." if is_alone else ""
    recurrent = f"{prefix}rnn.weight" not in tensors
    hidden = f"{prefix}rnn.weight_hh" if recurrent else f"{prefix}rnn.weight"
    for name in (hidden, f"{prefix}fc1.weight"):
        if name not in tensors:
            raise PyMARLError(f"{Path(folder) / 'agent.th'}: {name} is missing")
        if tensors[name].ndim != 2:
            raise PyMARLError(f"{Path(folder) / 'agent.th'}: {name} has shape {tensors[name].shape}")
    options = {"hidden_dim": tensors[hidden].shape[-1], "recurrent": recurrent}
    options["share_parameters"] = "none" if is_alone else "all"
    more = tensors[f"{prefix}fc1.weight"].shape[-1] - env_spec.obs_dim
    inputs = [
        {"agent_id": has_id, "last_action": has_action}
        for has_id, has_action in itertools.product((True, False), repeat=2)
        if has_id * env_spec.num_agents + has_action * env_spec.num_actions == more
    ]
    return options | (inputs[0] if len(inputs) == 1 else {})


def _layout(net: str, leaves: Collection[str]) -> Mapping[str, str]:
    """Returns the layout that names most of the leaves."""
    return max(NETS[net].layouts, key=lambda layout: len(set(layout.values()) & set(leaves)))


def _places(net: str, leaves: Mapping[str, Any]) -> dict[str, _Place]:
    """Returns torch's names for our leaves; a leaf without one keeps its path."""
    layout, places = _layout(net, leaves), {}
    for name, path in layout.items():
        if path not in leaves:
            continue
        if "*" in name:
            indices = range(leaves[path].shape[0])
            places |= {name.replace("*", str(index)): _Place(path, (index,)) for index in indices}
        else:
            places[name] = _Place(path, ())
    return places | {path: _Place(path, ()) for path in leaves if path not in layout.values()}


def _stacked(tensors: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Returns the leaf that consists of the tensors, given by their index in it."""
    return tensors[()] if () in tensors else np.stack([tensors[index] for index in sorted(tensors)])


def _flatten(params: PyTree) -> dict[str, Any]:
    return flatten_dict(params, sep="/")  # type: ignore[return-value]


def _files_to_read(folder: Path, like: Mapping[str, PyTree]) -> list[str]:
    """Lists the files to read: all that exist, and the required ones, which are refused later if they are missing."""
    needed = [name for name, net in NETS.items() if not net.optional and like.get(net.ours)]
    return [name for name in NETS if name in needed or (folder / f"{name}.th").is_file()]


def _as_numpy(torch: ModuleType, tensor: Any, where: str) -> np.ndarray:
    kind = getattr(tensor, "dtype", type(tensor).__name__)
    if kind != torch.float32:
        raise PyMARLError(f"{where} is {kind}, expected is torch.float32")
    return tensor.detach().numpy()


def _step_folders(folder: Path) -> str:
    """Returns a hint if the folder is that of a whole run: PyMARL saves into one folder per environment step."""
    steps = [path for path in folder.glob("*/") if (path / "agent.th").is_file()] if folder.is_dir() else []
    return f"; name one of its folders instead, {min(steps)} for instance" if steps else ""


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise PyMARLError(f"PyMARL's checkpoints need torch: {install_extra('torch')}") from None
    return torch
