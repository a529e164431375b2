"""metrics.py: the paper's formulas, by hand, by loop and against the golden numbers."""
import numpy as np
import pytest
from metrics import compute_metrics, count_mflops, time_one_query

from mrl_files import InputError


def hits_of(*rows):
    """A database in which row i has label i, and lists that hit exactly where a row says 1: queries have label 0."""
    return np.array([0, 1]), np.zeros(len(rows), int), 1 - np.array(rows)


def test_map_is_divided_by_k():
    scores = compute_metrics(*hits_of([1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]), ks=[4])[4]
    assert scores["mAP"] == pytest.approx(((1 + 2 / 3) / 4 + 1 + 0) / 3)
    assert scores["precision"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert scores["topk"] == pytest.approx(2 / 3)


def test_recall_divides_by_the_classs_count_in_the_database():
    yb, yq = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 7])            # no image of class 7
    scores = compute_metrics(yb, yq, np.array([[0, 3], [4, 3], [0, 1]]), ks=[1, 2])
    assert scores[1]["recall"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    assert scores[2]["recall"] == pytest.approx((1 / 3 + 2 / 2 + 0) / 3)


def test_minus_one_is_a_miss():
    yb, yq = np.array([1, 0]), np.array([0])                           # row -1, the last, has the query's label
    assert compute_metrics(yb, yq, np.array([[-1, -1]]), ks=[2])[2] == {
        "mAP": 0, "precision": 0, "recall": 0, "topk": 0}


def test_many_ks_at_once_equal_the_loop_of_definitions():
    rng = np.random.default_rng(0)
    yb, yq = rng.integers(0, 5, 200), rng.integers(0, 5, 9001)          # more queries than one chunk
    I = rng.integers(-1, 200, (9001, 12))
    together = compute_metrics(yb, yq, I, ks=[12, 1, 5])
    r = np.array([[i >= 0 and yb[i] == y for i in row] for y, row in zip(yq, I, strict=True)])
    for k in (1, 5, 12):
        average = [sum(r[q, j] * r[q, :j + 1].mean() for j in range(k)) / k for q in range(0, 9001, 500)]
        assert compute_metrics(yb, yq[::500], I[::500], ks=[k])[k]["mAP"] == pytest.approx(np.mean(average))
        assert together[k]["precision"] == pytest.approx(r[:, :k].mean())
        assert together[k]["topk"] == pytest.approx(r[:, :k].any(1).mean())
        assert together[k]["recall"] == pytest.approx((r[:, :k].sum(1) / np.bincount(yb)[yq]).mean())
        assert together[k] == pytest.approx(compute_metrics(yb, yq, I, ks=[k])[k])


@pytest.mark.parametrize("n, dim, dims, lists, expected", [
    (1281167, 2048, [], [], 2623.830016), (1281167, 16, [2048], [200], 20.908272),
    (1281167, 8, [16, 32, 64, 128, 2048], [800, 400, 200, 50, 10], 10.314616),
    (4202000, 64, [128, 256, 512, 1024, 2048], [800, 400, 200, 50, 10], 269.30688)])
def test_mflops_are_the_papers(n, dim, dims, lists, expected):
    assert count_mflops(n, dim, dims, lists) == pytest.approx(expected, abs=1e-9)


def test_time_one_query_is_the_median_of_single_queries(monkeypatch):
    """The machine does something else during four of 30: 120 ms would be the median of the first few."""
    now, asked = [0.0], []

    def answer(i):
        asked.append(i)
        now[0] += 0.120 if 2 <= len(asked) <= 5 else 0.002 if len(asked) % 2 else 0.004
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    found = time_one_query(answer, queries=20)
    assert found == {"ms": pytest.approx(4), "ms_low": pytest.approx(2), "ms_high": pytest.approx(4)}
    assert asked == [0, *range(20), *range(10)]                        # the first is the warm-up


def test_time_one_query_stops_after_its_time():
    asked = []
    time_one_query(asked.append, queries=50, seconds=0)
    assert asked == [0, 0]


@pytest.mark.parametrize("yq, I, ks, complaint", [
    ([0, 1], [[0]], [1], "1 neighbour lists do not fit 2 query labels"),
    ([0], [[0, 1]], [3], "between 1 and the list's length, 2"),
    ([0], [[0, 1]], [0], "between 1 and the list's length, 2"),
    ([0], [[0, 5]], [1], "the database has 2 labels")])
def test_what_does_not_fit_is_refused(yq, I, ks, complaint):
    with pytest.raises(InputError, match=complaint):
        compute_metrics(np.array([0, 1]), np.array(yq), np.array(I), ks)
