"""The part of pysc2 that finds the game; it looks at its folders, not at its program."""

import collections
import os

Version = collections.namedtuple("Version", "game_version build_version data_version binary")

KNOWN = {"4.6.2": 69232, "4.10.0": 75689}


class Linux:
    def __init__(self, version):
        self.data_dir, self._exec_name = os.path.expanduser(os.environ.get("SC2PATH", "~/StarCraftII")), "SC2_x64"
        found = sorted(int(name[4:]) for name in os.listdir(os.path.join(self.data_dir, "Versions")))
        builds = {**{name: build for name, build in KNOWN.items() if build in found}, "latest": max(found)}
        name = (version or "latest") + ".0" * ((version or "").count(".") == 1)
        if name not in builds:
            raise ValueError(f"Unknown game version: {name}. Known versions: {sorted(builds)}.")
        self.version = Version(name, builds[name], None, None)

    def map_data(self, path):
        with open(os.path.join(self.data_dir, "Maps", path), "rb") as file:
            return file.read()


def get(version=None):
    return Linux(version)
