"""serving.py: the adaptive index is shortlist + re-ranking, in memory, from a file and by FAISS alone."""
from itertools import product

import numpy as np
import pytest
import retrieval_world
from indexes import STORES
from neighbors import search
from retrieval_world import assert_nearest
from serving import adaptive_index, adaptive_search, read_adaptive_index

from mrl_files import InputError


@pytest.fixture(scope="module")
def world():
    xb, _, xq, _ = retrieval_world.world(3000, 60, 64)
    return xb, xq


@pytest.mark.parametrize("index, storage, rerank_dim", [
    *product(("exactl2", "hnsw32", "ivf_sq8"), STORES, (None, 40)), ("hnsw8", "float16", 40), ("ivf_pq", "sq8", 40)])
def test_the_adaptive_index_is_shortlist_and_rerank(world, tmp_path, index, storage, rerank_dim):
    xb, xq = world
    file = tmp_path / "a.index"
    built = adaptive_index(xb, 8, rerank_dim, index, shortlist=100, storage=storage, file=file, record={})
    slack = {"float32": 2e-6, "float16": 2e-3, "sq8": 0.05}[storage]
    for k, shortlist in ((10, 100), (7, 100), (1, 1), (3, 50)):
        D, I = adaptive_search(built, xq, np.int64(k), shortlist)      # as of np.arange
        if index == "exactl2":
            among = search(xb, xq, 8, shortlist)[1]
            assert_nearest(xb, xq, rerank_dim or 64, I, D, among, slack)
        assert (I >= 0).all() and (np.diff(D) >= 0).all()
    served = read_adaptive_index(file)
    assert np.array_equal(adaptive_search(served, xq, 10, 100)[1], adaptive_search(built, xq, 10, 100)[1])
    assert np.array_equal(served.search(xq, 10)[1], adaptive_search(built, xq, 10, 100)[1])   # FAISS alone


def test_adaptive_graph_and_flat_first_stage_agree(world):
    xb, xq = world
    lists = [adaptive_search(adaptive_index(xb, 16, index=index), xq, 10)[1] for index in ("hnsw32", "exactl2")]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*lists, strict=True)]) > 0.99


@pytest.mark.parametrize("k, shortlist", [(10, 5), (0, 5), (10, 3001)])
def test_adaptive_search_refuses_lengths_that_do_not_fit(world, k, shortlist):
    with pytest.raises(InputError, match="must be 1 <= k <= shortlist <= 3000"):
        adaptive_search(adaptive_index(world[0], 8, index="exactl2"), world[1], k, shortlist)


def test_a_query_without_its_row_is_refused(world):
    with pytest.raises(InputError, match=r"shape \[64\], not \[q, 64\]"):
        adaptive_search(adaptive_index(world[0], 8, index="exactl2"), world[1][0], 10)


@pytest.mark.parametrize("shortlist", [9, 3001])
def test_a_shortlist_that_faiss_cannot_keep_is_refused(world, shortlist):
    with pytest.raises(InputError, match=f"shortlist={shortlist} is not between 10 and 3000"):
        adaptive_index(world[0], 8, index="exactl2", shortlist=shortlist)
    with pytest.raises(InputError, match="at most 1,000 k candidates"):
        adaptive_search(adaptive_index(world[0], 8, index="exactl2"), world[1], 2, 2001)


def test_places_that_are_not_filled_are_infinitely_far(world):
    """A graph over equal vectors finds few of them."""
    xb = np.tile(world[0][:1], (500, 1))
    D, I = adaptive_search(adaptive_index(xb, 8, index="hnsw8"), world[1][:5], 200)
    assert (I < 0).any() and np.isinf(D[I < 0]).all() and np.isfinite(D[I >= 0]).all()


def test_vectors_that_are_not_finite_are_named(world):
    xb, xq = (x.copy() for x in world)
    index = adaptive_index(xb, 16, index="exactl2")
    xb[77, 0], xq[3, 0] = np.inf, np.nan
    with pytest.raises(InputError, match="the database: row 77"):
        adaptive_index(xb, 16)
    with pytest.raises(InputError, match="the queries: row 3"):
        adaptive_search(index, xq, 5)


def test_vectors_of_zeros_are_found_last_and_counted(capsys):
    """On the first prefix alone, and on both; by FAISS alone, as it is served."""
    xb, _, xq, _ = retrieval_world.world(600, 20, 32)
    xb, xq = np.abs(xb), np.abs(xq)
    xb[7, :8] = xb[9] = 0
    for kind in ("exactl2", "hnsw32", "ivf_sq8"):
        index = adaptive_index(xb, 8, 32, kind, shortlist=100)
        end = "left out of the index" if kind == "ivf_sq8" else "cosine 0 to all, found last"
        said = capsys.readouterr().err
        assert f"note: 2 of 600 vectors of the database are zero in their first 8 numbers: {end}" in said
        _, I = adaptive_search(index, xq, 100, 100)
        assert not np.isin(I, [7, 9]).any()
    assert (index.search(xb[[7]], 1)[1] != 9).all()
