"""indexes.py: how indexes are built, kept, completed and read again."""
import re
from pathlib import Path

import numpy as np
import pytest
import retrieval_world
from indexes import (
    INDEXES,
    choose_clusters,
    choose_code,
    list_stores,
    new_index,
    read_index,
    release_pages,
    reserve,
)
from neighbors import searcher, unit

from mrl_files import InputError


@pytest.fixture(scope="module")
def world():
    xb, _, xq, _ = retrieval_world.world(3000, 60, 64)
    return xb, xq


@pytest.mark.parametrize("index", ["exactl2", "hnsw8"])
def test_an_index_has_its_memory_before_it_grows(world, index):
    empty = new_index(world[0], 16, INDEXES[index])
    (store,) = list_stores(empty)
    reserve(store, 1000)
    before = int(store.codes.data())
    for lo in range(0, 1000, 100):
        empty.add(unit(world[0][lo:lo + 100], 16))
    assert int(store.codes.data()) == before and store.codes.size() == 1000 * 64


# ------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("index", ["exactl2", "hnsw8", "ivf_sq8"])
def test_an_index_is_kept_and_used_again_only_for_its_embeddings(world, tmp_path, index, monkeypatch):
    xb, xq = world
    file, other = tmp_path / "1K_16dim.index", xb[::-1].copy()
    built = []
    monkeypatch.setattr("neighbors.new_index", lambda *of, **more: built.append(of) or new_index(*of, **more))
    first = searcher(xb, 16, index, file, {"database": "a"})(xq, 5)
    again = searcher(xb, 16, index, file, {"database": "a"})(xq, 5)
    assert len(built) == 1 and np.array_equal(first[1], again[1])
    changed = searcher(other, 16, index, file, {"database": "b"})(xq, 5)
    assert len(built) == 2 and (changed[1] == len(xb) - 1 - first[1]).mean() > 0.8


def test_an_interrupted_index_is_completed(world, tmp_path, monkeypatch):
    xb, _ = world
    file = tmp_path / "1K_16dim.index"
    monkeypatch.setattr("indexes.ADDED", 1000 * 4 * xb.shape[1])
    monkeypatch.setattr("time.monotonic", iter(range(0, 100_000, 61)).__next__)     # each step is a minute
    adds = []

    def unit_until(x, dim, first, **options):
        adds.append(first)
        if adds == [0, 1000]:
            raise KeyboardInterrupt
        return unit(x, dim, first=first, **options)
    monkeypatch.setattr("neighbors.unit", unit_until)

    def index():
        searcher(xb, 16, "hnsw32", file, {"database": "a"})
    with pytest.raises(KeyboardInterrupt):
        index()
    index()
    assert read_index(file).ntotal == 3000
    assert adds == [0, 1000, 1000, 2000]


def test_a_broken_index_file_is_refused(world, tmp_path):
    file = tmp_path / "1K_16dim.index"
    searcher(world[0], 16, "exactl2", file, {})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"1K_16dim.index: not a complete FAISS index; delete it"):
        searcher(world[0], 16, "exactl2", file, {})


def test_clusters_and_codes_that_fit():
    assert [choose_clusters(n) for n in (1, 400, 4000, 200_000, 1_281_167)] == [1, 10, 102, 1024, 2048]
    assert [choose_code(dim) for dim in (1, 7, 8, 16, 18, 64)] == [1, 1, 2, 4, 3, 16]


def test_too_few_vectors_for_a_product_quantiser(world):
    with pytest.raises(InputError, match="product quantisers need 256 vectors, the database has 255"):
        searcher(world[0][:255], 16, "ivf_pq")


def mapped_mb():
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def test_a_mapped_file_that_was_read_is_given_back(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((8192, 1024), np.float32))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")[5:]
    assert x.sum() == 8187 * 1024
    before = mapped_mb()
    release_pages(x)
    assert before - mapped_mb() > 30 and (x == 1).all()
    release_pages(np.ones(3))      # not mapped: nothing to do
