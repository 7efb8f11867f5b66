"""One of SMACv2's maps."""


def get_smac_map_registry():
    return {"10gen_terran": {"n_agents": 10, "n_enemies": 10, "limit": 200}}
