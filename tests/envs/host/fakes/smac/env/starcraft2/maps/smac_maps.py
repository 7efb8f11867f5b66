"""Some of SMAC's maps; the limit of the second is short, and the game is slow to create the units of the third."""

map_param_registry = {
    "3s5z": {"n_agents": 8, "n_enemies": 8, "limit": 150},
    "3m": {"n_agents": 3, "n_enemies": 3, "limit": 6},
    "8m": {"n_agents": 8, "n_enemies": 8, "limit": 120, "slow": 1},
}


def get_smac_map_registry():
    return map_param_registry
