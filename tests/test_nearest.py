"""1-NN at all sizes at once against cosines of each prefix."""
import nearest
import numpy as np
import pytest

SIZES = [2, 4, 16]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    xb, xq = (np.maximum(rng.standard_normal((n, 16)), 0).astype(np.float32) for n in (500, 90))
    return xb, xq                                     # as after a ReLU: some 2-prefixes are all zero


def cosines(xb, xq, size):
    """[q, n] float64; 0 where a prefix is zero."""
    b, q = (x[:, :size] / np.maximum(np.linalg.norm(x[:, :size], axis=1, keepdims=True), 1e-12)
            for x in (xb.astype(np.float64), xq.astype(np.float64)))
    return q @ b.T


def test_the_largest_cosine_is_found(arrays, monkeypatch):
    monkeypatch.setattr(nearest, "QUERIES", 40)       # several blocks of each, the last one smaller
    monkeypatch.setattr(nearest, "DATABASE", 200)
    xb, xq = arrays
    assert (xb[:, :2] == 0).all(1).any() and (xq[:, :2] == 0).all(1).any()
    found = nearest.nearest(xb, xq, SIZES)
    assert found.shape == (3, 90) and found.dtype == np.int64
    for g, size in enumerate(SIZES):
        truth = cosines(xb, xq, size)
        np.testing.assert_allclose(truth[np.arange(90), found[g]], truth.max(1), atol=1e-6)
        if size == 16:                                # no ties: the same neighbours
            assert (found[g] == truth.argmax(1)).all()


def test_by_hand():
    xb = np.array([[1, 0, 0], [0, 1, 9], [0, 0, 1]], np.float32)
    xq = np.array([[5, 1, 0], [1, 2, 7]], np.float32)
    # size 1: directions 1, 0, 0 and 1, 1: row 0. size 3: row 0; (1, 2, 7) is nearest to (0, 1, 9)
    assert nearest.nearest(xb, xq, [1, 3]).tolist() == [[0, 0], [0, 1]]


def test_rows_of_zeros_are_never_nearest_and_counted_once(arrays, monkeypatch, capsys):
    monkeypatch.setattr(nearest, "QUERIES", 40)
    monkeypatch.setattr(nearest, "DATABASE", 200)
    xb, xq = arrays
    zero, asked = (xb[:, :2] == 0).all(1), (xq[:, :2] > 0).all(1)
    found = nearest.nearest(xb, xq, SIZES)[0]
    assert zero.any() and not zero[found[asked]].any()
    assert capsys.readouterr().err.count(f"note: {zero.sum()} of 500 vectors of the database are zero in their first 2 "
                                         "numbers: cosine 0 to all, found last\n") == 1


def test_read_only_arrays_are_left_as_they_are(arrays, tmp_path):
    np.save(tmp_path / "xb.npy", arrays[0])
    xb = np.load(tmp_path / "xb.npy", mmap_mode="r")
    nearest.nearest(xb, arrays[1], SIZES)
    np.testing.assert_array_equal(xb, arrays[0])
