"""Arrays in pieces of bounded size, so that saving and restoring a run never copies a whole replay.

A piece is a block of consecutive elements in row-major order. The bytes of all pieces in order are those of the array.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECE_BYTES = 4 * 2**20
"""The most bytes of one piece, unless a single element has more."""

BATCH_BYTES = 4 * PIECE_BYTES
"""The most bytes of pieces that are written or read at the same time."""

BATCH_COPIES = 5
"""The most copies of such a batch that exist at a time: as pieces, encoded, compressed and in the buffers of files.

Measured with ``python -m experiments.checkpoint_cost``.
"""

Index = tuple[slice, ...]


def buffer_bytes(num_bytes: int) -> int:
    """Returns the most bytes that writing or reading arrays of ``num_bytes`` takes in addition to the arrays."""
    return BATCH_COPIES * min(BATCH_BYTES + PIECE_BYTES, num_bytes)


def piece_shape(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """Returns the shape of an array's pieces; the last along an axis may be shorter. A small array is one piece."""
    num_bytes = np.dtype(dtype).itemsize
    for axis in reversed(range(len(shape))):
        if num_bytes * shape[axis] > PIECE_BYTES:
            return (1,) * axis + (max(1, PIECE_BYTES // num_bytes), *shape[axis + 1 :])
        num_bytes *= shape[axis]
    return shape


def piece_indices(shape: tuple[int, ...], piece: tuple[int, ...]) -> Iterator[Index]:
    """Yields the place of each piece in an array, in row-major order."""
    for starts in itertools.product(*(range(0, size, step) for size, step in zip(shape, piece, strict=True))):
        yield tuple(
            slice(start, min(start + step, size)) for start, step, size in zip(starts, piece, shape, strict=True)
        )


class Pieces:
    """An array on the host or on devices, cut into pieces.

    Attributes:
        shape: the shape of the whole array.
        dtype: its dtype.
        size: its number of elements.
    """

    def __init__(self, array: jax.Array | np.ndarray) -> None:
        """Takes a numpy array, or a JAX array whose first axis may be spread over devices."""
        self.shape, self.dtype, self.size = array.shape, np.dtype(array.dtype), array.size
        self._parts: dict[int, jax.Array | np.ndarray] = {0: array} if isinstance(array, np.ndarray) else {}
        for shard in () if isinstance(array, np.ndarray) else array.addressable_shards:
            self._parts[(shard.index[0].start or 0) if shard.index else 0] = shard.data  # devices may hold equal copies

    def __iter__(self) -> Iterator[tuple[Index, np.ndarray]]:
        """Yields place and content of each piece: a view where the host can read it, else a copy."""
        for index in piece_indices(self.shape, piece_shape(self.shape, self.dtype)):
            yield index, self._read(index)

    def _read(self, index: Index) -> np.ndarray:
        if len(self._parts) == 1:
            return _host_view(self._parts[0], index)
        first, *rest = index
        found = []
        for start, part in sorted(self._parts.items()):
            low, high = max(first.start - start, 0), min(first.stop - start, part.shape[0])
            if low < high:
                found.append(_host_view(part, (slice(low, high), *rest)))
        return found[0] if len(found) == 1 else np.concatenate(found)


def _host_view(part: jax.Array | np.ndarray, index: Index) -> np.ndarray:
    """Returns some rows of one device's part; of a large array on an accelerator only these are copied to the host."""
    if isinstance(part, jax.Array) and not _is_on_host(part):
        starts, sizes = [place.start for place in index], tuple(place.stop - place.start for place in index)
        return np.asarray(part if sizes == part.shape else _slice(part, starts, sizes))
    return np.asarray(part)[index]


def _is_on_host(part: jax.Array) -> bool:
    return next(iter(part.devices())).platform == "cpu"


_slice = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


@functools.partial(jax.jit, donate_argnums=0)  # as a decorator with options, jit is newer than jax 0.7
def _update(whole: jax.Array, piece: jax.Array, starts: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, piece, starts)


def assemble(pieces: Iterable[tuple[Index, np.ndarray]], like: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts an array together on its devices, piece by piece.

    Args:
        pieces: place and content of each piece, in any order.
        like: shape, dtype and sharding of the array; only the first axis may be spread over devices.
    """
    if math.prod(like.shape) * like.dtype.itemsize <= PIECE_BYTES:
        [(_, whole)] = pieces
        return jax.device_put(whole, like.sharding)
    assert like.sharding is not None
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    rows = {device: slice(*index[0].indices(like.shape[0])) for device, index in indices.items() if index is not None}
    wholes = {
        device: jnp.zeros((held.stop - held.start, *like.shape[1:]), like.dtype, device=device)
        for device, held in rows.items()
    }
    for (first, *rest), piece in pieces:
        for device, held in rows.items():
            low, high = max(first.start, held.start), min(first.stop, held.stop)
            if low < high:
                starts = [low - held.start, *(place.start for place in rest)]
                part = jax.device_put(piece[low - first.start : high - first.start], device)
                wholes[device] = _update(wholes[device], part, starts).block_until_ready()  # frees the piece
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, list(wholes.values()))


def assemble_on_host(pieces: Iterable[tuple[Index, np.ndarray]], like: Any) -> np.ndarray:
    """Puts a numpy array of the shape and dtype of ``like`` together."""
    whole = np.empty(like.shape, like.dtype)
    for index, piece in pieces:
        whole[index] = piece
    return whole


def checksum(piece: np.ndarray, crc: int) -> int:
    """Returns the CRC-32 of ``piece``'s bytes, continued from ``crc``."""
    return zlib.crc32(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data, crc)
