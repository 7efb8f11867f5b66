"""SMAClite where rtree has no library."""

raise OSError("Could not load libspatialindex_c library")
