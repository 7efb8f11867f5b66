"""flax modules as pure functions of a plain tree of parameters."""

from typing import Any

import flax.linen as nn

from wqmix_jax.types import PRNGKey, PyTree


def init_net(net: nn.Module, key: PRNGKey, *inputs: Any) -> PyTree:
    """Draws the parameters of a net for inputs of these shapes; an empty tree for one without parameters."""
    return net.init(key, *inputs).get("params", {})


def apply_net(net: nn.Module, params: PyTree, *inputs: Any, method: str = "__call__") -> Any:
    """What the net, or another method of it, makes of its inputs."""
    return net.apply({"params": params}, *inputs, method=method)
