"""Pieces cover an array once, in order and in bounded size, wherever the array is."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wqmix_jax.runs import checkpoint_pieces
from wqmix_jax.runs.checkpoint_pieces import (
    Pieces,
    assemble,
    assemble_on_host,
    buffer_bytes,
    checksum,
    piece_indices,
    piece_shape,
)
from wqmix_jax.training.devices import seed_sharding

SHAPES = [(4, 5, 16), (4, 3), (2, 300), (6,), (2, 1, 7, 3), (300, 1)]


def shardings() -> dict[str, Sharding]:
    return {
        "one device": SingleDeviceSharding(jax.local_devices()[1]),
        "seeds": seed_sharding(2, batch_size=1),
        "batch": NamedSharding(jax.make_mesh((2,), ("batch",), devices=jax.local_devices()[:2]), PartitionSpec()),
    }


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_pieces, "PIECE_BYTES", 64)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8, bool, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["numpy", "one device", "seeds", "batch"])
def test_what_was_cut_is_put_together(
    where: str, shape: tuple[int, ...], dtype: Any, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_pieces, "_is_on_host", lambda _: on_host)
    whole = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    sharding = shardings().get(where)
    cut = Pieces(whole if sharding is None else jax.device_put(whole, sharding))
    assert (cut.shape, cut.dtype, cut.size) == (whole.shape, whole.dtype, whole.size)
    found = list(cut)
    assert all(piece.nbytes <= 64 for _, piece in found)
    assert b"".join(piece.tobytes() for _, piece in found) == whole.tobytes(), "in row-major order"
    crc = 0
    for _, piece in found:
        crc = checksum(piece, crc)
    assert crc == zlib.crc32(whole.tobytes())
    np.testing.assert_array_equal(assemble_on_host(found, whole), whole)
    for target in shardings().values():
        restored = assemble(found, jax.ShapeDtypeStruct(shape, whole.dtype, sharding=target))
        assert restored.sharding.is_equivalent_to(target, len(shape))
        for shard in restored.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_a_cpus_pieces_are_views() -> None:
    array = jax.device_put(np.arange(100.0, dtype=np.float32), jax.local_devices()[0])
    assert all(np.shares_memory(piece, np.asarray(array)) for _, piece in Pieces(array))


def test_a_large_element_is_one_piece() -> None:
    assert piece_shape((2, 3), np.dtype("S100")) == (1, 1)
    assert list(piece_indices((), ())) == [()]


def test_buffers_of_a_small_array_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert buffer_bytes(10) == 10 * checkpoint_pieces.BATCH_COPIES
    assert buffer_bytes(10**12) == buffer_bytes(10**9) < 1.5e8
