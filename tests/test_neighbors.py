"""neighbors.py: every index type against brute force, on small data of random shapes; blocks equal one pass."""
import weakref

import neighbors
import numpy as np
import pytest
import retrieval_world
import torch
from indexes import INDEXES
from neighbors import multiply_with_torch, search, searcher, unit
from retrieval_world import assert_nearest, distances

from mrl_files import InputError

SHAPES = [tuple(np.random.default_rng(seed).integers((30, 1, 3), (900, 50, 70))) for seed in range(6)]


@pytest.fixture(scope="module")
def world():
    xb, _, xq, _ = retrieval_world.world(3000, 60, 64)
    return xb, xq


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("n, q, d", SHAPES)
def test_every_index_and_size_equals_brute_force(index, n, q, d):
    xb, _, xq, _ = retrieval_world.world(n, q, d, seed=n)
    for dim in sorted({1, 2, d // 2, d}) if index == "exactl2" else sorted({max(2, d // 2), d}):
        k = min(n, 25)
        D, I = search(xb, xq, dim, k, index)
        assert D.shape == I.shape == (q, k) and D.dtype == np.float32
        if index == "exactl2":
            assert_nearest(xb, xq, dim, I, D)
        else:
            truth = np.sort(distances(xb, xq, dim), 1)[:, :k]
            assert (truth[:, -1:] + 2e-6 >= D).mean() > 0.97            # as near as the k-th, but for a few
            assert (I >= 0).all()
            np.testing.assert_allclose(D, np.take_along_axis(distances(xb, xq, dim), I, 1), atol=2e-6)


def test_the_whole_database_in_order():
    xb, _, xq, _ = retrieval_world.world(70, 5, 12)
    for index in INDEXES:
        D, I = search(xb, xq, 12, 70, index)
        assert_nearest(xb, xq, 12, I, D)


@pytest.mark.parametrize("index, recall", [("hnsw32", 0.99), ("hnsw8", 0.97)])
def test_a_graphs_list_has_no_holes(world, index, recall):
    xb, xq = world
    exact = search(xb, xq, 16, 1000)[1]
    found = search(xb, xq, 16, 1000, index)[1]
    assert (found >= 0).all()                                           # efSearch >= k
    assert np.mean([len(set(a) & set(b)) / 1000 for a, b in zip(found, exact, strict=True)]) > recall


@pytest.mark.parametrize("rows", [1000, 999, 50])
def test_blocks_equal_one_pass(world, rows):
    xb, xq = world
    D, I = search(xb, xq, 16, 70)
    blocks_D, blocks_I = search(xb, xq, 16, 70, memory_gb=rows * 16 * 4 / 1e9)
    assert_nearest(xb, xq, 16, blocks_I, blocks_D)
    np.testing.assert_allclose(blocks_D, D, atol=2e-6)
    assert (np.sort(blocks_I) == np.sort(I)).mean() > 0.999


def test_one_block_at_a_time_is_in_memory(world):
    xb, xq = (neighbors.unit(x, 16) for x in world)
    given = []

    def blocks():
        for lo in range(0, 1000, 300):
            assert all(block() is None for block in given)
            block = xb[lo:lo + 300].copy()
            given.append(weakref.ref(block))
            yield lo, block
            del block
    neighbors.search_exactly(blocks(), xq, 5, "cpu")
    assert len(given) == 4


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_memory_maps_and_float16_are_searched_and_left_as_they_are(world, tmp_path, index, dtype):
    paths = [tmp_path / "xb.npy", tmp_path / "xq.npy"]
    for path, x in zip(paths, world, strict=True):
        np.save(path, x.astype(dtype))
    xb, xq = (np.load(path, mmap_mode="r") for path in paths)
    D, I = search(xb, xq, 7, 10, index)
    if index == "exactl2":
        assert_nearest(xb, xq, 7, I, D)
    assert (search(np.array(xb), np.array(xq), 7, 10, index)[0] <= D + 1e-3).mean() > 0.95
    assert all(np.array_equal(np.load(path), x.astype(dtype)) for path, x in zip(paths, world, strict=True))


@pytest.mark.parametrize("rows", [2 ** 28, 2000])
def test_torch_gives_the_same_as_faiss(world, rows, monkeypatch):
    xb, xq = world
    monkeypatch.setattr("neighbors.PRODUCTS", rows * 3)
    torch.set_float32_matmul_precision("high")                          # TF32 must not reach distances
    S, I = multiply_with_torch(unit(xq, 16), unit(xb, 16), 30, "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert_nearest(xb, xq, 16, I, 2 - 2 * S)


def test_on_a_gpu_faiss_is_used_where_it_can_and_torch_where_not(monkeypatch):
    monkeypatch.setattr("faiss.knn_gpu", lambda *of, **more: "faiss")
    monkeypatch.setattr("neighbors.multiply_with_torch", lambda *of: "torch")
    found = {}
    for has in (None, "memory of a GPU"):
        monkeypatch.setattr("neighbors.gpu_faiss", lambda has=has: has)
        found |= {(has is not None, k): neighbors.multiply(None, None, k, "cuda") for k in (2048, 2049)}
    assert found == {(False, 2048): "torch", (False, 2049): "torch", (True, 2048): "faiss", (True, 2049): "torch"}


@pytest.mark.gpu
def test_a_gpu_gives_the_same_as_the_cpu(world):
    xb, xq = world
    for dim, k in ((8, 100), (64, 2500)):
        D, I = search(xb, xq, dim, k, device="cuda")
        assert_nearest(xb, xq, dim, I, D)


def test_numpys_integers_are_sizes_too(world):
    assert np.array_equal(search(*world, np.int64(16), np.int32(5), "hnsw32")[1], search(*world, 16, 5, "hnsw32")[1])


def test_what_a_graph_does_not_find_is_minus_one_and_far():
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), (2000, 1))       # only two different vectors
    D, I = search(signs, signs[:20], 1, 2000, "hnsw8")
    assert ((I < 0) == np.isinf(D)).all() and np.isinf(D).any()


def test_one_query_equals_its_row_in_a_batch(world):
    xb, xq = world
    find = searcher(xb, 16)
    together = find(xq, 10)[0]
    alone = np.concatenate([find(xq[i:i + 1], 10)[0] for i in range(len(xq))])
    np.testing.assert_allclose(alone, together, atol=2e-6)


# ------------------------------------------------------------------------------------------------ bad input

@pytest.fixture
def features(world):
    """As after a ReLU: not negative, two database vectors and a query zero in their first 16 numbers."""
    xb, xq = (np.maximum(x, 0) for x in world)
    xb[[77, 1078], :16] = xq[3, :16] = 0
    return xb, xq


@pytest.mark.parametrize("options", [{}, {"memory_gb": 70 * 64 / 1e9}, {"index": "hnsw32"}, {"index": "hnsw8"}])
def test_vectors_of_zeros_are_found_last_and_counted_once(features, capsys, options):
    xb, xq = features
    D, I = search(xb, xq, 16, len(xb) if "index" not in options else 100, **options)
    place = np.isin(I, [77, 1078])
    others = np.arange(len(xq)) != 3
    if "index" in options:      # the nearest 100 hold neither
        assert not place[others].any()
    else:                       # none comes before a vector that shares a direction with the query
        shares = (xq[:, None, :16] * xb[I[:, :], :16]).sum(2) > 0
        assert (place[others].sum(1) == 2).all() and not (shares & (place.cumsum(1) > 0))[others].any()
        np.testing.assert_allclose(D[place], 2, atol=1e-6)
    assert capsys.readouterr().err.count("note: 2 of 3000 vectors of the database are zero in their first 16") == 1


@pytest.mark.parametrize("index", INDEXES)
def test_distances_are_2_less_2_cosines_where_a_vector_is_zero_too(world, index):
    """Features of any sign: to nothing is a vector of zeros the nearest. A query of zeros is equally far from all."""
    xb, xq = (np.concatenate([np.zeros((3, 64), np.float32), x[:500]]) for x in world)
    xq[3] = -1
    D, I = search(xb, xq, 16, 200, index)
    cosine = (xq[:, None, :16] * xb[I, :16]).sum(2) / np.maximum(
        np.linalg.norm(xq[:, None, :16], axis=2) * np.linalg.norm(xb[I, :16], axis=2), 1e-9)
    np.testing.assert_allclose(D, 2 - 2 * cosine, atol=3e-6)
    assert (I[3:, 0] > 2).all()


@pytest.mark.parametrize("dim", [2, 64, 256, 2048])
def test_how_close_distances_may_be_told_apart(dim):
    """Never an order wrong by 5e-6, as the README says; by 2e-7, as it once said, often."""
    rng, seen = np.random.default_rng(0), []
    for falling in (0, 4):      # all numbers alike, or the last ten thousand times smaller than the first
        scale = 10.0 ** (-falling * np.arange(dim) / dim)
        means = rng.standard_normal((40, dim))
        xb, xq = ((means[rng.integers(0, 40, n)] + noise * rng.standard_normal((n, dim))) * scale
                  for n, noise in ((2000, rng.choice([1e-4, 1e-2, 0.1], (2000, 1))), (100, 1e-3)))
        xb, xq = xb.astype(np.float32), xq.astype(np.float32)
        truth = np.take_along_axis(distances(xb, xq, dim), search(xb, xq, dim, 50)[1], 1)
        seen.append((np.maximum.accumulate(truth, 1) - truth).max())
    assert 2e-7 < max(seen) < 5e-6


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_named(world, index, value):
    xb, xq = (x.copy() for x in world)
    xb[[77, 78], :16] = value
    with pytest.raises(InputError, match=r"the database: row 77 is not finite .* 16 numbers \(2 such"):
        search(xb, xq, 16, 5, index)
    with pytest.raises(InputError, match="the database: row 77"):
        search(xb, xq, 16, 5, memory_gb=70 * 64 / 1e9)                  # in the second block
    xq[3, 0] = np.nan
    with pytest.raises(InputError, match="the queries: row 3"):
        search(world[0], xq, 16, 5, index)


@pytest.mark.parametrize("settings, complaint", [
    ({"retrieval_dim": 65}, "size 65 is not between 1 and the 64"), ({"retrieval_dim": 0}, "size 0"),
    ({"k": 3001}, "k=3001 is not between 1 and the 3000"), ({"k": 0}, "k=0"),
    ({"index": "hnsw_32"}, "unknown index 'hnsw_32': exactl2, hnsw32, hnsw8"),
    ({"device": "gpu"}, "unknown device 'gpu'"), ({"memory_gb": 0}, "memory_gb=0")])
def test_settings_that_do_not_fit_are_refused(world, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        search(*world, **{"retrieval_dim": 16, "k": 10} | settings)


def test_queries_of_another_width_are_refused(world):
    with pytest.raises(InputError, match="the queries have 32 dimensions, the database 64"):
        search(world[0], world[1][:, :32], 16, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(world):
    with pytest.raises(InputError, match="device cuda was asked for"):
        search(*world, 16, 5, device="cuda")
