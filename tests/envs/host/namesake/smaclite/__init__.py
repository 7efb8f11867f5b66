"""SMAClite of the time before gymnasium: it registers its maps with gym, which the adapter doesn't read."""
