"""rerank.py: against brute force and the golden lists; the input is never written; any storage gives the same."""
import numpy as np
import pytest
import retrieval_world
from metrics import compute_metrics
from rerank import argsort_descending, funnel, rerank, sort_by_row
from retrieval_world import assert_nearest, distances

from mrl_files import InputError

FUNNEL = [16, 32, 64, 128, 256], [200, 100, 50, 25, 10]


@pytest.fixture(scope="module")
def world():
    xb, _, xq, _ = retrieval_world.world(3000, 40, 48)
    I = np.argsort(distances(xb, xq, 8), 1, kind="stable")[:, :100].astype(np.int32)
    return xb, xq, I


def test_golden_lists_and_metrics(golden):
    numbers, lists = golden("retrieval")
    xb, yb, xq, yq = retrieval_world.golden_world()
    made = {"shortlist": lists["shortlist"], "reranked": rerank(xb, xq, lists["shortlist"], 256, 200),
            "funnel": funnel(xb, xq, lists["shortlist"], *FUNNEL)}
    for name, I in made.items():
        assert I.shape == lists[name].shape
        assert (I == lists[name]).mean() > 0.999                        # equal but for float ties
        for key in (key for key in numbers if key.startswith(f"{name}@")):
            k = int(key.split("@")[1])
            ours, theirs = compute_metrics(yb, yq, I, [k])[k], numbers[key]
            hits = (yb[I[:, :k]] == yq[:, None]).sum(1)
            assert [ours[m] for m in ("mAP", "precision", "topk")] == pytest.approx(
                [theirs[m] for m in ("mAP", "precision", "topk")], abs=1e-9)
            assert (hits / 1300).mean() == pytest.approx(theirs["recall_over_1300"], abs=1e-9)
            assert ours["recall"] == pytest.approx((hits / np.bincount(yb)[yq]).mean(), abs=1e-9)


def test_sorting_is_numpys_stable_sort():
    rng = np.random.default_rng(0)
    values = rng.choice(np.float32([-np.inf, -2, -1e-45, -0.0, 0, 1e-45, 1e-20, 0.5, 1, np.inf]), (50, 300))
    values[25:] += rng.standard_normal((25, 300), np.float32)
    assert (argsort_descending(values) == np.argsort(-values, axis=1, kind="stable")).all()


@pytest.mark.parametrize("dim, shortlist", [(1, 100), (9, 7), (48, 100), (33, 1), (48, 99)])
def test_equals_brute_force_among_the_shortlist(world, dim, shortlist):
    xb, xq, I = world
    assert_nearest(xb, xq, dim, rerank(xb, xq, I, dim, shortlist), among=I[:, :shortlist])


def test_the_whole_database_as_shortlist_is_exact_search(world):
    xb, xq, _ = world
    everything = np.tile(np.random.default_rng(0).permutation(len(xb)), (len(xq), 1))
    assert_nearest(xb, xq, 48, rerank(xb, xq, everything, 48, len(xb)))


def test_funnels_give_the_same_alone_and_in_sequence_and_write_nothing(world):
    xb, xq, I = (array.copy() for array in world)
    schedules = [[80, 40, 10], [40, 20, 10], [20, 15, 10]]
    alone = [funnel(*(array.copy() for array in world), [16, 32, 48], lengths) for lengths in schedules]
    in_sequence = [funnel(xb, xq, I, [16, 32, 48], lengths) for lengths in schedules]
    assert all(np.array_equal(a, b) for a, b in zip(alone, in_sequence, strict=True))
    assert all(np.array_equal(now, before) for now, before in zip((xb, xq, I), world, strict=True))


def test_a_funnel_is_rerank_after_rerank(world):
    xb, xq, I = world
    by_hand = rerank(xb, xq, rerank(xb, xq, I, 16, 60), 48, 20)
    assert np.array_equal(funnel(xb, xq, I, [16, 48], [60, 20]), by_hand)


@pytest.mark.parametrize("kind", ["memory map", "read-only", "columns first", "float64", "slice"])
def test_any_storage_gives_the_same(world, kind, tmp_path):
    xb, xq, I = world
    np.save(tmp_path / "xb.npy", xb)
    stored = {"memory map": lambda: np.load(tmp_path / "xb.npy", mmap_mode="r"),
              "read-only": lambda: np.frombuffer(xb.tobytes(), np.float32).reshape(xb.shape),
              "columns first": lambda: np.asfortranarray(xb), "float64": lambda: xb.astype(np.float64),
              "slice": lambda: np.hstack([xb, xb])[:, :48]}[kind]()
    assert_nearest(xb, xq, 48, rerank(stored, xq, I, 48, 100), among=I)


def test_float16_is_ranked_by_its_own_values(world, monkeypatch):
    xb, xq, I = world
    monkeypatch.setattr("rerank.COPIED_PAIRS", 300)                       # several pieces
    half = xb.astype(np.float16)
    assert_nearest(half, xq, 48, rerank(half, xq, I, 48, 100), among=I)


def test_pieces_give_the_same_as_one(world, monkeypatch):
    xb, xq, I = world
    whole = rerank(xb, xq, I, 48, 100)
    monkeypatch.setattr("rerank.PAIRS", 77)
    assert np.array_equal(rerank(xb, xq, I, 48, 100), whole)


def test_the_database_is_read_sort_by_row():
    candidates = np.random.default_rng(0).integers(-1, 500_000, 10_000)
    order = sort_by_row(candidates, 500_000)
    rows = candidates[order]
    assert sorted(order) == list(np.flatnonzero(candidates >= 0))
    assert (np.diff(rows // 8) >= 0).all()                              # 500,000 / 65,536, rounded up


def test_minus_one_comes_last_and_stays(world):
    xb, xq, I = world
    holed = I.copy()
    holed[::2, ::3] = -1
    result = rerank(xb, xq, holed, 48, 100)
    missing = (holed < 0).sum(1)
    assert ((result < 0).sum(1) == missing).all()
    assert all((row[len(row) - m:] == -1).all() for row, m in zip(result, missing, strict=True))
    assert_nearest(xb, xq[1::2], 48, result[1::2], among=I[1::2])


def test_equal_distances_keep_the_order_of_the_list(world):
    xb, xq, _ = world
    twins = np.concatenate([xb[:5], xb[:5], xb[:5]])
    I = np.array([[12, 2, 7]] * len(xq))
    assert np.array_equal(rerank(twins, xq, I, 48, 3), I)


def test_a_vector_of_zeros_comes_after_all_that_are_like_the_query(world):
    """Cosine 0 to all: last among features, which are not negative; a query of zeros keeps the list's order."""
    xb, xq, I = (np.abs(array) for array in world)
    xb[I[:, 7], :16] = 0
    xq[3] = 0
    result = rerank(xb, xq, I, 16, 20)
    zero = ~xb[result, :16].any(2)
    assert zero.any() and (np.sort(zero, 1) == zero)[np.arange(len(xq)) != 3].all()
    assert np.array_equal(result[3], I[3, :20])


@pytest.mark.parametrize("change, dim, shortlist, complaint", [
    (None, 49, 10, "size 49 does not fit"), (None, 0, 10, "size 0 does not fit"),
    (None, 48, 101, "shortlist 101"), ("row", 48, 10, "the database has 3000"), ("queries", 48, 10, "39 queries"),
    ("nan", 48, 100, "the database: row 5 is not finite"), ("inf", 48, 100, "the database: row 5 is not finite"),
    ("nan query", 48, 10, "the queries: row 3"), ("inf query", 48, 10, "the queries: row 3")])
def test_what_does_not_fit_is_refused(world, change, dim, shortlist, complaint):
    xb, xq, I = (array.copy() for array in world)
    I[7, 50] = 5
    if change == "row":
        I[0, 0] = 3000
    elif change == "queries":
        xq = xq[1:]
    elif change in ("nan", "inf"):
        xb[5] = float(change)
    elif change:
        xq[3] = float(change.split()[0])
    with pytest.raises(InputError, match=complaint):
        rerank(xb, xq, I, dim, shortlist)


@pytest.mark.parametrize("dims, lengths, complaint", [
    ([16, 48], [10, 20], "must not grow"), ([16], [10, 5], "as many sizes as shortlists"), ([], [], "as many sizes")])
def test_funnels_that_grow_or_do_not_match_are_refused(world, dims, lengths, complaint):
    with pytest.raises(InputError, match=complaint):
        funnel(*world, dims, lengths)
