"""SMAC's client, by its own signature."""

from battle import StarCraft2Client

from smac.env.starcraft2.maps import smac_maps


class StarCraft2Env(StarCraft2Client):
    def __init__(
        self,
        map_name="8m",
        step_mul=8,
        move_amount=2,
        difficulty="7",
        game_version=None,
        seed=None,
        continuing_episode=False,
        obs_all_health=True,
        obs_own_health=True,
        obs_last_action=False,
        obs_pathing_grid=False,
        obs_terrain_height=False,
        obs_instead_of_state=False,
        obs_timestep_number=False,
        state_last_action=True,
        state_timestep_number=False,
        reward_sparse=False,
        reward_only_positive=True,
        reward_death_value=10,
        reward_win=200,
        reward_defeat=0,
        reward_negative_scale=0.5,
        reward_scale=True,
        reward_scale_rate=20,
        replay_dir="",
        replay_prefix="",
        window_size_x=1920,
        window_size_y=1200,
        heuristic_ai=False,
        heuristic_rest=False,
        debug=False,
    ):
        params = smac_maps.get_smac_map_registry()[map_name]
        units, rewards = (params["n_agents"], params["n_enemies"]), (reward_death_value, reward_win, reward_scale_rate)
        self.prepare(*units, params["limit"], seed, continuing_episode, *rewards, slow=params.get("slow", 0))

    def reset(self):
        self.begin()
        self.init_units()
        return self.get_obs(), self.get_state()
