"""Rows read from the files of a store equal the rows that Zarr reads."""

import numpy as np
import pytest
import torch
import zarr

from stages.lib.store import shards
from stages.lib.store.stored_rows import StoredRows
from stages.lib.store.zarr_store import ArraySpec, create_store, finish_store, open_store, write_rows


@pytest.fixture(params=["chunks", "shards"])
def store(tmp_path, monkeypatch, request):
    """(150, 2, 4, 3, 5) float16 under a group's name, and (150, 7) float32."""
    if request.param == "shards":
        monkeypatch.setattr(shards, "UNSHARDED_ROWS", 100)
        monkeypatch.setattr(shards, "SHARD_ROWS", 64)
    random = np.random.default_rng(0)
    rows = [
        {
            "3x5/mean": random.normal(size=(2, 4, 3, 5)).astype(np.float16),
            "3x5/flat": random.normal(size=7).astype(np.float32),
        }
        for _ in range(150)
    ]
    path = tmp_path / "latents.zarr"
    group = create_store(
        path,
        {
            name: ArraySpec((150, *value.shape), value.dtype, tuple("nvchw"[: value.ndim + 1]))
            for name, value in rows[0].items()
        },
        {},
    )
    write_rows(group, rows)
    finish_store(path, group)
    return path, open_store(path, "encode_images")


def test_rows_and_views_equal_zarrs(store):
    path, group = store
    index = torch.tensor([149, 0, 63, 64, 64, 127, 128])
    views = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    for name in ("3x5/mean", "3x5/flat"):
        rows, reference = StoredRows(path, group, name), torch.from_numpy(np.asarray(group[name][:]))
        assert rows.shape == reference.shape
        assert torch.equal(rows[index], reference[index])
        assert rows[index].dtype == reference.dtype
    rows, reference = StoredRows(path, group, "3x5/mean"), torch.from_numpy(np.asarray(group["3x5/mean"][:]))
    assert torch.equal(rows[index, views], reference[index, views])
    assert torch.equal(rows[index, 1], reference[index, 1])


def test_what_is_read_is_a_copy(store):
    path, group = store
    rows = StoredRows(path, group, "3x5/mean")
    rows[torch.tensor([3])].zero_()
    assert rows[torch.tensor([3])].abs().sum() > 0


def test_a_group_is_no_array(store):
    path, group = store
    assert isinstance(group["3x5"], zarr.Group)
    with pytest.raises(KeyError):
        StoredRows(path, group, "3x5")
