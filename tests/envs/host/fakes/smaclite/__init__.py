"""SMAClite registers its maps with gymnasium."""

import gymnasium

for name, map_info in {"1m": (1, 1), "3m": (3, 3), "3s5z": (8, 8)}.items():
    gymnasium.register(f"smaclite/{name}-v0", "smaclite.env:SMACliteEnv", kwargs={"map_info": map_info})
gymnasium.register("smaclite/custom-v0", "smaclite.env:SMACliteEnv")
