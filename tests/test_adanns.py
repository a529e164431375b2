"""adanns.py: clusters at one size and search at another, against brute force; the study, its files, its resumption."""
import json
import shutil
from pathlib import Path

import adanns
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import retrieval_world
from adanns import choose_best, count_ivf_mflops, fill_lists, make_clusters, measure, run, search_lists
from retrieval_world import assert_nearest, distances
from study import Study, Task

from mrl_files import InputError

WORLD = retrieval_world.world(600, 25, 16)
FLAGS = {"sizes": [4, 16], "nlist": 16, "probes": [1, 16], "code_bytes": [4]}


@pytest.mark.parametrize("d_c, d_s", [(4, 4), (4, 16), (16, 8)])
def test_all_clusters_are_exact_search(d_c, d_s):
    xb, _, xq, _ = WORLD
    centroids, labels = make_clusters(xb, d_c, 16)
    lists = fill_lists(xb, d_s, labels, 16)
    assert_nearest(xb, xq, d_s, search_lists(centroids, lists, xq, xq, 50, 16))
    assert lists.ntotal == len(xb)


def test_one_cluster_is_exact_search_in_it():
    """Its vectors are those of the nearest centroid at d_c, compared at d_s; then nothing."""
    xb, _, xq, _ = WORLD
    centroids, labels = make_clusters(xb, 4, 16)
    I = search_lists(centroids, fill_lists(xb, 16, labels, 16), xq, xq, 100, 1)
    middles = centroids.reconstruct_n()
    nearest = ((retrieval_world.unit(xq, 4)[:, None] - middles) ** 2).sum(2).argmin(1)
    for row, cluster, truth in zip(I, nearest, distances(xb, xq, 16), strict=True):
        members = np.flatnonzero(labels == cluster)
        assert np.array_equal(row[:len(members)], members[np.argsort(truth[members])][:100])
        assert (row[len(members):] == -1).all()


def test_zeros_of_either_size_are_never_found():
    xb, _, xq, _ = WORLD
    xb = xb.copy()
    xb[7, :4] = xb[9] = 0
    for d_c, d_s, missing in ((4, 16, {7, 9}), (16, 4, {7, 9}), (16, 16, {9})):
        centroids, labels = make_clusters(xb, d_c, 16)
        I = search_lists(centroids, fill_lists(xb, d_s, labels, 16), xq, xq, 600, 16)
        assert all({*range(600)} - {*row} == missing for row in I.tolist())


def test_mflops_are_those_of_the_papers_own_plot():
    """1.285263 and 82.060224, coordinates in the authors' ablations/plots.ipynb: 64 clusters at 64, 32 at 2,048."""
    assert count_ivf_mflops(1281167, 64, 64, 64, 1) == pytest.approx(1.285263)
    assert count_ivf_mflops(1281167, 2048, 2048, 32, 1) == pytest.approx(82.060224)


def test_the_best_at_each_cost():
    table = pd.DataFrame({"model": "mrl", "method": ["IVF"] * 4 + ["PQ"], "mflops": [3, 1, 2, 1, np.nan],
                          "top1": [0.9, 0.5, 0.5, 0.4, 1]})
    assert choose_best(table).index.tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------ the study

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """MRL's embeddings, and fixed features of two sizes beside them."""
    folder = tmp_path_factory.mktemp("adanns")
    retrieval_world.write(folder / "in", WORLD, nesting_list=[4, 8, 16])
    for d in (4, 16):
        xb, yb, xq, yq = WORLD
        retrieval_world.write(folder / "in", (xb[:, -d:], yb, xq[:, -d:], yq), model="mrl0_e0")
    task = Task(str(folder / "in"), str(folder / "out"))
    return task, run(Study(task), **FLAGS)


def test_the_table_has_every_index_once(study):
    _, table = study
    assert table.groupby(["model", "method"]).size().to_dict() == {
        ("mrl", "exact"): 2, ("mrl", "IVF"): 4, ("mrl", "AdANNS-IVF"): 4, ("mrl", "PQ"): 2, ("mrl", "OPQ"): 2,
        ("ff", "exact"): 2, ("ff", "IVF"): 4, ("ff", "MG-IVF"): 4, ("ff", "PQ"): 2, ("ff", "OPQ"): 2}
    assert table[["top1", "1-recall@1", "40-recall@2048"]].le(1).all().all()


def test_all_probes_score_as_exact_search(study):
    """And accuracy and recall are those of brute force."""
    _, table = study
    xb, yb, xq, yq = WORLD
    order = {d: distances(xb, xq, d).argsort(1) for d in (4, 16)}
    table = table[table.model == "mrl"]
    for row in table[(table.nprobe == 16) | (table.method == "exact")].itertuples(index=False):
        top1, one, forty = row[-4:-1]
        assert top1 == pytest.approx((yb[order[row.d_s][:, 0]] == yq).mean())
        assert one == pytest.approx((order[row.d_s][:, 0] == order[16][:, 0]).mean())
        assert forty == 1                                                 # 600 vectors are fewer than 2,048
    assert table[table.nprobe == 1]["40-recall@2048"].between(0.1, 0.9).all()


def test_what_is_written(study):
    task, table = study
    folder = f"{task.output}/report/1K_mrl_adanns"
    text = Path(f"{folder}.md").read_text()
    assert text.count("| MRL | AdANNS-IVF |") == len(choose_best(table).query("method == 'AdANNS-IVF'"))
    assert "| FF | OPQ | 4 |" in text and "paper_top1" not in text
    for picture in ("compute", "recall"):
        pixels = plt.imread(f"{folder}_{picture}.png")
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.05


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    task = Task(str(retrieval_world.write(tmp_path, WORLD)), str(tmp_path / "out"))
    made, real = [], adanns.measure_accuracy
    flags = ([4, 16], 16, [1, 2], [])

    def judge_until(*of):
        made.append(of)
        if len(made) == 5:
            raise KeyboardInterrupt
        return real(*of)
    monkeypatch.setattr(adanns, "measure_accuracy", judge_until)
    with pytest.raises(KeyboardInterrupt):
        measure(Study(task), *flags)
    kept = json.loads((tmp_path / "out/report/1K_mrl_adanns.json").read_text())["rows"]
    assert [len(rows) for rows in kept.values()] == [1, 1, 2]
    rows = measure(Study(task), *flags)
    assert len(made) == 5 + 6 and len(rows) == 10
    assert measure(Study(task._replace(output=str(tmp_path / "new"))), *flags) == rows


def test_other_embeddings_are_measured_anew(study, tmp_path):
    task, table = study
    xb, yb, xq, yq = retrieval_world.world(600, 25, 16, seed=3)
    retrieval_world.write(tmp_path / "in", (xb, yb, xq, yq), nesting_list=[4, 16])
    task = task._replace(embeddings=str(tmp_path / "in"), output=str(tmp_path))
    (tmp_path / "report").mkdir()
    shutil.copy(f"{study[0].output}/report/1K_mrl_adanns.json", tmp_path / "report")
    assert [row["top1"] for row in measure(Study(task), [4, 16], 16, [], [])] != table.top1[:2].tolist()


def test_the_papers_figures_stand_beside_imagenets(tmp_path):
    rng, y = np.random.default_rng(0), np.arange(1000)
    retrieval_world.write(tmp_path, (rng.random((1000, 8), np.float32), y, rng.random((9, 8), np.float32), y[:9]))
    study = Study(Task(str(tmp_path), str(tmp_path / "out")))
    rows = pd.DataFrame(measure(study, [8], 4, [1], []), columns=adanns.COLUMNS)
    table = adanns.add_paper(rows, study)
    assert table.paper_top1.tolist()[0] == 0.6219 and table.paper_top1.isna().tolist() == [False, True]
    text = adanns.format_study(table, study)
    assert "| MRL | exact |  | 8 |  |  | 0.008 | 0.00% | 100.00% | 100.00% | 62.19% |\n" in text
    names = [text.get_text() for text in adanns.draw_compute(table, study).axes[0].get_legend().get_texts()]
    assert names[-2:] == ["exact, the MRL paper's", "IVF-RR and AdANNS-IVF, its authors'"]


@pytest.mark.parametrize("flags, complaint", [
    ({"sizes": [4, 32]}, "size 32 is past them"), ({"nlist": 601}, "nlist=601 is not between 1 and the 600 vectors"),
    ({"probes": [1, 17]}, "nprobe=17 is not between 1 and the 16 clusters")])
def test_bad_input(study, tmp_path, flags, complaint):
    with pytest.raises(InputError, match=complaint):
        run(Study(study[0]), **FLAGS | flags)


def test_too_few_vectors_and_other_images(tmp_path, capsys):
    xb, yb, xq, yq = retrieval_world.world(200, 9, 8)
    task = Task(str(tmp_path), str(tmp_path / "out"))
    retrieval_world.write(tmp_path, (xb, yb, xq, yq), nesting_list=[4, 8])
    with pytest.raises(InputError, match="need 256 vectors, the database has 200; --bytes"):
        run(Study(task))
    assert adanns.find_rigid(Study(task), [4]) == []
    assert "note: no rigid representations to compare with" in capsys.readouterr().err
    retrieval_world.write(tmp_path, (xb[:, :4], yb, xq[:, :4], yq), model="mrl0_e0")
    assert adanns.find_rigid(Study(task), [8]) == []
    assert "note: the rigid representations have the sizes [4], none of [8]" in capsys.readouterr().err
    retrieval_world.write(tmp_path, (xb, yb[::-1], xq, yq), model="mrl0_e0")
    with pytest.raises(InputError, match=r"mrl0_e0_ff8-X.npy: other images than those of 1K_train_mrl0_e0_ff4-X.npy"):
        run(Study(task._replace(model="ff")), nlist=4, code_bytes=[])
