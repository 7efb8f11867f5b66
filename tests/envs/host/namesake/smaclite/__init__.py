"""SMAClite of the time before gymnasium: it registers its maps with gym, where nobody looks."""
