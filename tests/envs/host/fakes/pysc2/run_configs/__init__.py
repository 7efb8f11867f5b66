"""The part of pysc2 that finds the game."""

import collections
import os

Version = collections.namedtuple("Version", "game_version build_version data_version binary")


class Linux:
    def __init__(self, version):
        self.data_dir = os.path.expanduser(os.environ.get("SC2PATH", "~/StarCraftII"))
        known = {"4.6.2": 69232, "4.10": 75689}
        self.version = Version(version or "latest", known.get(version), None, "SC2_x64")

    def map_data(self, path):
        with open(os.path.join(self.data_dir, "Maps", path), "rb") as file:
            return file.read()


def get(version=None):
    if version not in (None, "4.6.2", "4.10"):
        raise ValueError(f"Unknown game version: {version}.")
    return Linux(version)
