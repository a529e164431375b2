"""projection.py: SVD as NumPy's, JL's distances, and arrays that all of retrieval reads."""
import numpy as np
import pytest
import retrieval_world
from neighbors import search
from projection import draw_jl, fit_svd, project
from stages import ensure_neighbors, score
from study import Study, Task

from mrl_files import InputError, read_json

WORLD = retrieval_world.world(300, 20, 16)


def test_svd_is_numpys(monkeypatch):
    """In blocks, with float16 input too, up to the vectors' signs; the best approximation of its rank; nested."""
    monkeypatch.setattr("projection.ROWS", 64)
    xb = WORLD[0]
    right = np.linalg.svd(xb.astype(np.float64), full_matrices=False)[2]
    for X, slack in ((xb, 1e-5), (xb.astype(np.float16), 2e-2)):
        matrix = fit_svd(X, 5)
        assert matrix.shape == (16, 5) and matrix.dtype == np.float32
        np.testing.assert_allclose(np.abs(np.sum(matrix * right[:5].T, axis=0)), 1, atol=slack)
    assert (matrix[np.abs(matrix).argmax(0), range(5)] > 0).all()
    np.testing.assert_array_equal(fit_svd(xb, 16)[:, :5], fit_svd(xb, 5))


def test_svd_at_the_full_width_finds_the_same_neighbours():
    xb, _, xq, _ = WORLD
    matrix = fit_svd(xb, 16)
    I = search(xb @ matrix, xq @ matrix, 16, 10)[1]
    retrieval_world.assert_nearest(xb, xq, 16, I)


def test_jl_keeps_distances_on_average():
    xb, size = np.random.default_rng(1).standard_normal((40, 500)).astype(np.float32), 400
    matrix = draw_jl(xb, size)
    ratio = np.linalg.norm((xb[1:] - xb[:-1]) @ matrix, axis=1) / np.linalg.norm(xb[1:] - xb[:-1], axis=1)
    assert abs(ratio.mean() - 1) < 0.03 and ratio.std() < 2 / (2 * size) ** 0.5
    np.testing.assert_allclose(draw_jl(xb, 50) * 50 ** 0.5, matrix[:, :50] * size ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("method", ["svd", "jl"])
def test_arrays_that_retrieval_reads(tmp_path, method):
    """Of the largest fixed-feature model: database and queries by one map; labels and what is noted go with them."""
    xb, yb, xq, yq = WORLD
    for d in (4, 16):
        retrieval_world.write(tmp_path, (xb[:, -d:], yb, xq[:, -d:], yq), model="mrl0_e0", nesting_list=[d])
    task = Task(str(tmp_path), str(tmp_path / "out"), model="ff")
    files = project(Study(task), method, 12)
    assert [f.name for f in files] == [f"1K_{split}_mrl0_e0_{method}_ff12-X.npy" for split in ("train", "val")]
    study = Study(task._replace(model=f"ff_{method}"))
    assert study.sizes == [8, 12] and (study.labels(study.data(8))[0] == yb).all()
    matrix = {"svd": fit_svd, "jl": draw_jl}[method](xb, 12)
    np.testing.assert_allclose(study.data(8).xq, xq @ matrix, atol=1e-5)
    row = score(study, ensure_neighbors(study, 8, 20), [10])
    nearest = retrieval_world.distances(xb @ matrix, xq @ matrix, 8).argmin(1)
    assert row["top1"] == pytest.approx((yb[nearest] == yq).mean())
    assert read_json(files[0].with_suffix(".json"))["projection"]["method"] == method


def test_a_projection_is_made_once_and_again_for_other_embeddings(tmp_path, monkeypatch):
    task = Task(str(retrieval_world.write(tmp_path, WORLD)), str(tmp_path))
    files = project(Study(task), "jl")
    written = [f.stat().st_mtime_ns for f in files]
    assert project(Study(task), "jl") == files and [f.stat().st_mtime_ns for f in files] == written
    retrieval_world.write(tmp_path, retrieval_world.world(300, 20, 16, seed=1))
    project(Study(task), "jl")
    assert all(f.stat().st_mtime_ns > t for f, t in zip(files, written, strict=True))


def test_v2_is_projected_by_the_database_of_1k(tmp_path):
    xb, yb, xq, yq = WORLD
    retrieval_world.write(tmp_path, WORLD)
    retrieval_world.write(tmp_path, (xb, yb, xq[::-1], yq), dataset="V2", splits=["val"])
    task = Task(str(tmp_path), str(tmp_path))
    first, v2 = (project(Study(task._replace(dataset=dataset)), "svd", 8) for dataset in ("1K", "V2"))
    assert first[0] == v2[0] and np.allclose(np.load(first[1])[::-1], np.load(v2[1]), atol=1e-6)


def test_an_interrupted_projection_leaves_no_array_that_counts(tmp_path, monkeypatch):
    task = Task(str(retrieval_world.write(tmp_path, WORLD)), str(tmp_path))
    files = project(Study(task), "jl", 8)
    retrieval_world.write(tmp_path, retrieval_world.world(300, 20, 16, seed=1))
    monkeypatch.setattr("projection.write_json", lambda *of: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        project(Study(task), "jl", 8)
    assert not files[0].with_suffix(".json").exists()
    monkeypatch.undo()
    project(Study(task), "jl", 8)
    np.testing.assert_allclose(np.load(files[1]), np.load(tmp_path / "1K_val_mrl1_e0_ff16-X.npy")
                               @ draw_jl(WORLD[0], 8), atol=1e-5)


def test_bad_input(tmp_path):
    xb, yb, xq, yq = WORLD
    task = Task(str(retrieval_world.write(tmp_path, WORLD)), str(tmp_path))
    with pytest.raises(InputError, match="size 17 is not between 1 and the 16 dimensions"):
        project(Study(task), "svd", 17)
    with pytest.raises(InputError, match="10 vectors have no more than 10 singular values; give --size"):
        fit_svd(xb[:10], 11)
    xb = xb.copy()
    xb[3, 5] = np.nan
    retrieval_world.write(tmp_path, (xb, yb, xq, yq))
    for method in ("svd", "jl"):
        with pytest.raises(InputError, match="row 3 is not finite"):
            project(Study(task), method, 8)
    retrieval_world.write(tmp_path, WORLD)
    files = project(Study(task), "jl", 8)
    with pytest.raises(InputError, match=f"{files[0]} and {files[1]}: the same projection to another --size"):
        project(Study(task), "jl", 4)
    assert len(list(tmp_path.glob("*_jl_*-X.npy"))) == 2
    with pytest.raises(InputError, match="--model mrl_jl: is a projection"):
        project(Study(task._replace(model="mrl_jl")), "svd", 8)
