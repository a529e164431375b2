"""report.py: the lists of the study, what its table and pictures hold, and when the paper's curve is drawn."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import retrieval_world
from metrics import count_mflops
from report import PAPER, draw_costs, draw_sizes, format_table, list_stages, report, select_paper
from stages import ensure_neighbors
from study import Study, Task

from mrl_files import InputError

SIZES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    arrays = retrieval_world.world(400, 30, 16)
    retrieval_world.write(folder / "in", arrays, nesting_list=[2, 4, 8, 16])
    task = Task(str(folder / "in"), str(folder / "out"))
    return task, report(Study(task), ["exactl2", "hnsw32"], shortlist=50, ks=[10, 25])


def test_the_studys_lists_are_the_papers():
    all_1k, all_4k = list_stages(SIZES, "1K", 200, 1281167), list_stages(SIZES, "4K", 200, 4202000)
    assert len(all_1k) == 36 + 3 and (16, (2048,), (200,)) in all_1k
    assert all_1k[36:] == [(8, (16, 32, 64, 128, 2048), (800, 400, 200, 50, 10)),
                           (16, (32, 64, 128, 256, 2048), (200, 100, 50, 25, 10)),
                           (32, (64, 128, 256, 512, 2048), (200, 100, 50, 25, 10))]
    assert all_4k[36:] == [(32, (64, 128, 256, 512, 2048), (800, 400, 200, 50, 10)),
                           (64, (128, 256, 512, 1024, 2048), (800, 400, 200, 50, 10))]


def test_few_sizes_and_a_small_database_shorten_the_funnels():
    assert list_stages([2, 4, 8, 16, 32, 64], "1K", 200, 300)[15:] == [
        (2, (4, 8, 16, 32, 64), (300, 300, 200, 50, 10)), (4, (8, 16, 32, 64), (100, 50, 25, 10)),
        (8, (16, 32, 64), (50, 25, 10))]
    assert list_stages([8, 16], "1K", 200, 300) == [(8, (16,), (200,))]
    assert list_stages([8], "1K", 200, 300) == []


def test_the_table_has_every_list_once(study):
    _, table = study
    for _, rows in table.groupby("index"):
        assert rows.method.value_counts().to_dict() == {"single-shot": 4, "adaptive": 6, "funnel": 2}
    assert not table.duplicated(["index", "retrieval_dim", "rerank_dims", "shortlists"]).any()
    assert (table[["queries_per_s", "ms_per_query"]] > 0).all().all()
    assert table[["top1", "mAP@10", "topk@10"]].le(1).all().all()
    exact = table[(table["index"] == "exactl2") & (table.method == "single-shot")]
    assert exact["mAP@10"].is_monotonic_increasing
    assert exact.mflops.tolist() == [count_mflops(400, d) for d in (2, 4, 8, 16)]


def test_what_is_written_is_the_table_and_two_pictures(study):
    task, table = study
    folder = f"{task.output}/report/1K_mrl_"
    written = pd.read_csv(f"{folder}report.csv", dtype={"rerank_dims": str, "shortlists": str}, keep_default_na=False)
    assert np.allclose(written["mAP@10"].astype(float), table["mAP@10"])
    for picture in ("size", "cost"):
        pixels = plt.imread(f"{folder}{picture}.png")
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 0.05


def test_storage_of_what_is_re_ranked(study):
    """float16 and sq8 rows are serving indexes: their bytes are their files', their lists nearly those of float32."""
    task, _ = study
    table = report(Study(task), ["ivf_sq8"], [4, 8, 16], shortlist=50, ks=[10], storages=["float32", "float16", "sq8"])
    rows = table[(table.retrieval_dim == 4) & (table.rerank_dims == "8")].set_index("method")
    assert rows.index.tolist() == ["adaptive", "adaptive float32", "adaptive float16", "adaptive sq8"]
    kept = rows.bytes_per_vector
    assert kept["adaptive float32"] - kept["adaptive float16"] == pytest.approx(16, abs=0.5)
    assert kept["adaptive float16"] - kept["adaptive sq8"] == pytest.approx(8, abs=0.5)
    assert rows["mAP@10"]["adaptive float32"] == pytest.approx(rows["mAP@10"]["adaptive"], abs=1e-6)
    for column in ("mAP@10", "neighbors@10", "top1"):
        assert rows[column].max() - rows[column].min() < 0.1
    assert (rows[["queries_per_s", "ms_per_query"]] > 0).all().all()
    assert table.method.value_counts()["adaptive sq8"] == 3


def test_a_second_report_makes_nothing_again(study, monkeypatch):
    task, table = study
    monkeypatch.setattr("stages.write_list", lambda *of, **more: pytest.fail("a list was made again"))
    again = report(Study(task), ["exactl2", "hnsw32"], shortlist=50, ks=[10, 25])
    pd.testing.assert_frame_equal(again, table)


def test_lists_of_one_length_whatever_is_there(study, tmp_path):
    """Of a longer list the times would not compare."""
    mine = Study(study[0]._replace(output=str(tmp_path)))
    ensure_neighbors(mine, 8, 300)
    table = report(mine, sizes=[8, 16], shortlist=20, ks=[10])
    assert table[table.method == "single-shot"].k.tolist() == [20, 20]


def test_the_printed_table_is_format_table(study):
    _, table = study
    printed = format_table(table.assign(top1=0.1234))
    assert "12.34" in printed and "@25" not in printed


def test_a_size_with_zero_vectors_is_reported_with_a_note(tmp_path, capsys):
    xb, yb, xq, yq = retrieval_world.world(100, 10, 8)
    xb[5, :2] = 0
    retrieval_world.write(tmp_path, (xb, yb, xq, yq), nesting_list=[2, 4, 8])
    table = report(Study(Task(str(tmp_path), str(tmp_path / "out"))), ks=[10])
    assert set(table.retrieval_dim) == {2, 4, 8} and (table.ms_low <= table.ms_per_query).all()
    said = capsys.readouterr().err
    assert said.count("note: 1 of 100 vectors of the database are zero in their first 2 numbers") == 1


def test_a_report_always_has_map_at_10(tmp_path):
    retrieval_world.write(tmp_path, retrieval_world.world(100, 10, 8))
    table = report(Study(Task(str(tmp_path), str(tmp_path / "out"))), sizes=[4, 8], ks=[1, 20])
    assert {"mAP@1", "mAP@10", "mAP@20", "recall@1"} <= set(table.columns)
    retrieval_world.write(tmp_path, retrieval_world.world(9, 10, 8))
    with pytest.raises(InputError, match="the database has 9 vectors; a report judges the first 10"):
        report(Study(Task(str(tmp_path), str(tmp_path / "out"))))


def test_a_flat_curve_looks_flat(study):
    task, table = study
    flat = table.assign(**{"mAP@10": 0.97 + 0.001 * (table.retrieval_dim > 8)})
    figure = draw_costs(flat, select_paper(Study(task)), Study(task))
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(5) and low < 97 < high
    plt.close(figure)


def test_fixed_features_are_searched_size_by_size(tmp_path):
    for d in (4, 8):
        retrieval_world.write(tmp_path, retrieval_world.world(100, 10, d, seed=d), model="mrl0_e0")
    table = report(Study(Task(str(tmp_path), str(tmp_path / "out"), model="ff")), ks=[10])
    assert table[["method", "retrieval_dim"]].to_numpy().tolist() == [["single-shot", 4], ["single-shot", 8]]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("classes, drawn", [(1000, True), (20, False)])
def test_the_papers_curve_stands_beside_imagenets_only(tmp_path, study, classes, drawn):
    n, rng = 4000, np.random.default_rng(0)
    y = np.arange(n) % classes
    retrieval_world.write(tmp_path, (rng.random((n, 16), np.float32), y, rng.random((9, 16), np.float32), y[:9]))
    task, table = Task(str(tmp_path)), study[1]
    paper = select_paper(Study(task))
    assert bool(len(paper)) == drawn
    for figure in (draw_sizes(table, paper, task), draw_costs(table, paper, Study(task))):
        assert ("the paper's" in legend(figure.axes[0])) == drawn
        plt.close(figure)
    assert not len(select_paper(Study(task._replace(embeddings=study[0].embeddings))))


def test_the_papers_curves_are_consistent():
    paper = pd.read_csv(PAPER, dtype={"rerank_dims": str, "shortlists": str}, keep_default_na=False,
                        na_values={"top1": "", "mAP@10": ""})
    for row in paper.itertuples():
        dims, lengths = ([int(x) for x in text.split(",") if x] for text in (row.rerank_dims, row.shortlists))
        n = {"1K": 1281167, "4K": 4202000}[row.dataset]
        assert row.mflops == pytest.approx(count_mflops(n, row.retrieval_dim, dims, lengths), rel=1e-5)
    mrl = paper[(paper.dataset == "1K") & (paper.model == "mrl")].set_index(["retrieval_dim", "rerank_dims"])
    assert mrl.loc[(16, "2048"), "mAP@10"] == 0.6527 and mrl.loc[(2048, ""), "mAP@10"] == 0.6520
    assert mrl.loc[(16, ""), "top1"] == 0.6791
    assert len(paper) == 6 * 9 + 9 + (8 + 7 + 6 + 5) + (8 + 7 + 6 + 5 + 4 + 3) + 5
