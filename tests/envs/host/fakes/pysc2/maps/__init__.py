"""The part of pysc2 that names the files of maps."""

import collections

Map = collections.namedtuple("Map", "path")


def get(name):
    return Map(f"SMAC_Maps/{name}.SC2Map")
