"""stages.py: from files to files. Lists that fit are used again, stale ones made again, the original's CSV is read."""
import os

import neighbors
import numpy as np
import pytest
import retrieval_world
from metrics import count_mflops
from neighbor_lists import Recipe, list_file
from records import record_file
from retrieval_world import assert_nearest
from stages import (
    EVAL_CONFIGS,
    ensure_neighbors,
    ensure_reranked,
    ensure_serving_index,
    score,
    score_all,
)
from study import Study, Task

from mrl_files import InputError, read_json

WORLD = retrieval_world.world(400, 30, 32)
XB, YB, XQ, YQ = WORLD


# Each of these is a command: it opens the embeddings anew.

def search(task, *of, **more):
    return ensure_neighbors(Study(task), *of, **more)


def rerank(task, *of, **more):
    return ensure_reranked(Study(task), *of, **more)


def serve(task, *of, **more):
    return ensure_serving_index(Study(task), *of, **more)


def score_list(task, *of):
    return score(Study(task), *of)


def score_lists(task, *of, **more):
    return score_all(Study(task), *of, **more)


@pytest.fixture
def task(tmp_path):
    return Task(str(retrieval_world.write(tmp_path / "in", WORLD)), str(tmp_path / "out"))


def files_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".json")


@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("index", ["exactl2", "hnsw32"])
def test_search_writes_the_originals_names(task, tmp_path, index, csv):
    file = search(task._replace(index=index, csv=csv), 16, 20)
    assert files_under(tmp_path / "out") == [
        f"index_files/mrl/1K_16dim_{index}.index",
        f"neighbors/mrl/{index}_16dim_20shortlist_1K.{'csv' if csv else 'npy'}"]
    I = np.loadtxt(file, delimiter=",", dtype=int) if csv else np.load(file)
    if index == "exactl2":
        assert_nearest(XB, XQ, 16, I)


def test_rerank_and_funnel_write_the_originals_names(task, tmp_path):
    among = np.load(search(task, 8, 100))
    adaptive = np.load(rerank(task, 8, [32], [100]))
    assert_nearest(XB, XQ, 32, adaptive, among=among)
    funnel = np.load(rerank(task, 8, [16, 24, 32], [100, 30, 10]))
    assert funnel.shape == (30, 10)
    assert files_under(tmp_path / "out/neighbors") == [
        "funnel_retrieval/mrl/8dim-cascade[16,24,32]_shortlist[100,30,10]_1K_exactl2.npy",
        "mrl/exactl2_8dim_100shortlist_1K.npy", "reranked/mrl/8dim-reranked32_100shortlist_1K_exactl2.npy"]


def test_a_longer_list_that_is_there_is_re_ranked(task, tmp_path):
    search(task, 8, 300)
    among = np.load(search(task, 8, 100))[:, :50]
    assert_nearest(XB, XQ, 32, np.load(rerank(task, 8, [32], [50])), among=among)
    assert read_json(record_file(rerank(task, 8, [32], [50])))["k"] == 100
    rerank(task, 8, [32], [50], k=60)                                 # as asked for
    assert [f for f in files_under(tmp_path / "out/neighbors") if f.startswith("mrl")] == [
        f"mrl/exactl2_8dim_{k}shortlist_1K.npy" for k in (100, 300, 60)]


def test_the_default_length_is_2048_or_the_whole_database(task):
    assert np.load(search(task, 8)).shape == (30, 400)


def test_what_fits_is_not_made_again(task):
    files = [search(task, 8, 50), rerank(task, 8, [32], [50])]
    times = [f.stat().st_mtime_ns for f in files]
    assert [search(task, 8, 50), rerank(task, 8, [32], [50])] == files
    assert [f.stat().st_mtime_ns for f in files] == times


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("index", ["exactl2", "hnsw32"])
def test_lists_and_indexes_of_other_embeddings_are_made_again(task, split, index):
    task = task._replace(index=index)
    old = np.load(search(task, 8, 20)), np.load(rerank(task, 8, [32], [20]))
    other = retrieval_world.world(400, 30, 32, seed=1)
    retrieval_world.write(task.embeddings, other, splits=[split])
    xb, xq = (other[0], XQ) if split == "train" else (XB, other[2])
    new = np.load(search(task, 8, 20)), np.load(rerank(task, 8, [32], [20]))
    assert not np.array_equal(new[0], old[0]) and not np.array_equal(new[1], old[1])
    if index == "exactl2":
        assert_nearest(xb, xq, 8, new[0])
    assert_nearest(xb, xq, 32, new[1], among=new[0])


def test_one_changed_vector_makes_a_list_stale(task):
    search(task, 8, 20)
    changed = XB.copy()
    changed[17] = XQ[0]                                                 # now the nearest of query 0
    retrieval_world.write(task.embeddings, (changed, YB, XQ, YQ), splits=["train"])
    assert np.load(search(task, 8, 20))[0, 0] == 17


def test_funnels_give_the_same_alone_and_in_sequence(task, tmp_path):
    schedules = [[80, 40, 10], [40, 20, 10], [20, 15, 10]]
    in_sequence = [np.load(rerank(task, 8, [16, 24, 32], s, k=100)) for s in schedules]
    alone = [np.load(rerank(task._replace(output=str(tmp_path / str(s))), 8, [16, 24, 32], s)) for s in schedules]
    assert all(np.array_equal(a, b) for a, b in zip(alone, in_sequence, strict=True))


def test_a_streamed_search_reads_the_database_once_for_many_queries(task, monkeypatch):
    monkeypatch.setattr("stages.SEARCH_QUERIES", 7)
    passes, blocks = [], neighbors.unit_blocks
    monkeypatch.setattr("neighbors.unit_blocks", lambda *of: passes.append(of) or blocks(*of))
    search(task._replace(memory_gb=300 * 8 * 4 / 1e9), 8, 2)          # half of it: 50 queries, and their lists
    assert len(passes) == 1 + 30 + 1                                    # one query at a time, then all


def test_streamed_search_gives_the_same_list_and_keeps_no_index(task, tmp_path):
    whole = np.load(search(task, 8, 20))
    streamed = task._replace(output=str(tmp_path / "streamed"), memory_gb=64 * 8 * 4 / 1e9)
    assert (np.load(search(streamed, 8, 20)) == whole).mean() > 0.99
    assert files_under(tmp_path / "streamed") == ["neighbors/mrl/exactl2_8dim_20shortlist_1K.npy"]


def test_chunks_of_queries_give_the_same_lists(task, tmp_path, monkeypatch):
    whole = np.load(rerank(task, 8, [16, 32], [60, 10]))
    monkeypatch.setattr("stages.SEARCH_QUERIES", 7)
    monkeypatch.setattr("stages.RERANK_CANDIDATES", 7 * 60)
    pieces = np.load(rerank(task._replace(output=str(tmp_path / "pieces")), 8, [16, 32], [60, 10]))
    assert (pieces == whole).mean() > 0.99


def write_csv(task, recipe, I):
    """A list as the original writes it, with its spaces."""
    file = list_file(task.output, recipe, "1K", "mrl", ".csv")
    file = file.with_name(file.name.replace(",", ", "))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(file, I, fmt="%d", delimiter=",")
    return file


def test_the_originals_csv_is_read_and_re_ranked(task):
    I = np.tile(np.arange(50, 90), (30, 1))                             # not the nearest: this list was really read
    file = write_csv(task, Recipe("exactl2", 8, 40), I)
    assert search(task, 8, 40) == file
    assert_nearest(XB, XQ, 32, np.load(rerank(task, 8, [32], [40], k=40)), among=I)


def test_a_source_that_was_replaced_is_re_ranked_again(task):
    recipe = Recipe("exactl2", 8, 40)
    for first in (50, 200):
        I = np.tile(np.arange(first, first + 40), (30, 1))
        write_csv(task, recipe, I)
        assert_nearest(XB, XQ, 32, np.load(rerank(task, 8, [32], [40])), among=I)


def test_the_originals_csv_is_scored(task):
    write_csv(task, Recipe("exactl2", 8, 10, (16, 32), (20, 10)), np.tile(np.arange(10), (30, 1)))
    file = rerank(task, 8, [16, 32], [20, 10])
    assert file.name == "8dim-cascade[16, 32]_shortlist[20, 10]_1K_exactl2.csv"
    row = score_list(task, file, [10])
    assert row["precision@10"] == pytest.approx((YB[:10] == YQ[:, None]).mean())
    assert np.isnan(row["queries_per_s"]) and np.isnan(row["ms_per_query"])


def test_a_csv_older_than_the_embeddings_is_not_trusted(task):
    file = write_csv(task, Recipe("exactl2", 8, 40), np.tile(np.arange(40), (30, 1)))
    os.utime(file, ns=(0, 0))
    assert_nearest(XB, XQ, 8, np.load(search(task, 8, 40)))


def test_a_score_is_one_row_of_the_table(task):
    file = rerank(task, 8, [16, 32], [50, 12])
    row = score_list(task, file, [10, 25])
    I = np.load(file)
    times = dict.fromkeys(("queries_per_s", "ms_per_query", "ms_low", "ms_high", "build_s"), 0)
    size = os.path.getsize(f"{task.output}/index_files/mrl/1K_8dim_exactl2.index")
    assert 8 * 4 * 400 < size < 8 * 4 * 400 + 1000 and row["build_s"] > 0
    assert row["ms_low"] <= row["ms_per_query"] <= row["ms_high"]
    assert row | times == pytest.approx({
        "method": "funnel", "index": "exactl2", "retrieval_dim": 8, "rerank_dims": "16,32", "shortlists": "50,12",
        "k": 12, "mflops": count_mflops(400, 8, [16, 32], [50, 12]), "top1": (YB[I[:, 0]] == YQ).mean(),
        "mAP@10": row["mAP@10"], "precision@10": (YB[I[:, :10]] == YQ[:, None]).mean(),
        "recall@10": ((YB[I[:, :10]] == YQ[:, None]).sum(1) / np.bincount(YB)[YQ]).mean(),
        "topk@10": (YB[I[:, :10]] == YQ[:, None]).any(1).mean(), "bytes_per_vector": size / 400 + 32 * 4, **times})


def test_neighbors_found_are_a_share_of_the_exact_ones_at_the_full_width(task):
    file = search(task, 8, 20)
    assert "neighbors@10" not in score_lists(task, [10])[0]            # there is no list of them yet
    truth, I = np.load(search(task, 32, 12)), np.load(file)
    rows = {row["retrieval_dim"]: row["neighbors@10"] for row in score_lists(task, [10])}
    assert rows == {32: 1, 8: pytest.approx(np.mean([len({*a[:10]} & {*b[:10]}) / 10
                                                     for a, b in zip(I, truth, strict=True)]))}


def test_clusters_and_probes_are_part_of_what_an_index_and_a_list_were_made_from(task):
    task = task._replace(index="ivf_sq8")
    first = np.load(search(task, 8, 20))
    assert (first < 0).sum() == 0
    fewer = np.load(search(task._replace(nlist=50, nprobe=1), 8, 20))
    assert (fewer < 0).any()                                            # one cluster holds fewer than 20
    assert np.array_equal(np.load(search(task, 8, 20)), first)


def test_other_probes_search_the_same_index(task, tmp_path):
    task = task._replace(index="ivf_sq8", nlist=20)
    few, all_of_them = (np.load(search(task._replace(nprobe=nprobe), 8, 10)) for nprobe in (1, 20))
    index = tmp_path / "out/index_files/mrl/1K_8dim_ivf_sq8.index"
    written = index.stat().st_mtime_ns
    filled = np.load(search(task, 8, 10))                               # as many as its lists need
    assert (few < 0).any() and (filled >= 0).all() and (all_of_them >= 0).all()
    assert index.stat().st_mtime_ns == written


def test_time_is_that_of_search_and_re_ranking_together(task):
    first, second = search(task, 8, 50), rerank(task, 8, [32], [50])
    notes = [read_json(record_file(f)) for f in (first, second)]
    row = score_list(task, second)
    assert row["queries_per_s"] == pytest.approx(30 / (notes[0]["seconds"] + notes[1]["seconds"]))
    assert row["ms_per_query"] == pytest.approx(notes[0]["ms"] + notes[1]["ms"])
    assert score_list(task, first)["ms_per_query"] == pytest.approx(notes[0]["ms"])


def test_scores_refuse_a_list_of_other_embeddings(task):
    file = search(task, 8, 50)
    retrieval_world.write(task.embeddings, retrieval_world.world(400, 30, 32, seed=1))
    with pytest.raises(InputError, match="made from other embeddings"):
        score_list(task, file)


def test_scores_leave_out_lists_of_other_embeddings(task, capsys):
    old, kept = search(task, 16, 50), search(task, 8, 50)
    retrieval_world.write(task.embeddings, retrieval_world.world(400, 30, 32, seed=1))
    csv = search(task._replace(csv=True), 8, 50)
    assert score_lists(task, [10]) == [score_list(task, csv, [10])]
    said = capsys.readouterr().err
    assert all(f"{file} left out: made from other embeddings" in said for file in (old, kept))
    csv.unlink()
    with pytest.raises(InputError, match=r"no lists of 1K, mrl \(all\) that fit the embeddings"):
        score_lists(task)


def test_the_originals_words_choose_lists(task):
    rerank(task, 8, [32], [50]), rerank(task, 8, [16, 32], [50, 12])
    methods = {word: [row["method"] for row in score_lists(task, [10], word)] for word in EVAL_CONFIGS}
    assert methods == {"vanilla": ["single-shot"], "reranking": ["adaptive"], "funnel": ["funnel"],
                       "all": ["single-shot", "adaptive", "funnel"]}
    with pytest.raises(InputError, match="unknown eval_config 'adaptive': vanilla, reranking, funnel, all"):
        score_lists(task, eval_config="adaptive")


def test_imagenetv2_queries_search_1ks_database_and_share_its_index(task, tmp_path):
    v2 = retrieval_world.world(1, 9, 32, seed=5)
    retrieval_world.write(task.embeddings, v2, dataset="V2", splits=["val"])
    task = task._replace(dataset="V2")
    assert_nearest(XB, v2[2], 8, np.load(search(task, 8, 20)))
    assert files_under(tmp_path / "out") == ["index_files/mrl/1K_8dim_exactl2.index",
                                             "neighbors/mrl/exactl2_8dim_20shortlist_V2.npy"]
    study = Study(task)
    assert [len(y) for y in study.labels(study.data(8))] == [400, 9]


def test_fixed_features_have_one_file_a_size(task):
    for d in (8, 16):
        retrieval_world.write(task.embeddings, retrieval_world.world(400, 30, d, seed=d), model="mrl0_e0")
    task = task._replace(model="ff")
    assert Study(task).sizes == [8, 16]
    other = retrieval_world.world(400, 30, 16, seed=16)
    assert_nearest(other[0], other[2], 16, np.load(search(task, 16, 20)))
    with pytest.raises(InputError, match=r"sizes \[8, 16\], not 32"):
        search(task, 32, 20)
    for make in (lambda: rerank(task, 8, [16], [20]), lambda: serve(task, 8, 16)):
        with pytest.raises(InputError, match="re-ranking needs mrl or mrl_e"):
            make()


def test_sizes_are_those_inference_noted(task):
    assert Study(task).sizes == [8, 16, 32]
    retrieval_world.write(task.embeddings, WORLD, nesting_list=[2, 5, 32])
    assert Study(task).sizes == [2, 5, 32]


def test_float16_embeddings_are_searched_and_re_ranked(task):
    half = XB.astype(np.float16), YB, XQ.astype(np.float16), YQ
    retrieval_world.write(task.embeddings, half)
    among = np.load(search(task, 8, 50))
    assert_nearest(half[0], half[2], 8, among)
    assert_nearest(half[0], half[2], 32, np.load(rerank(task, 8, [32], [50])), among=among)


def test_the_serving_index_is_kept(task):
    task = task._replace(index="hnsw32")
    file, index = serve(task, 8, shortlist=100, storage="float16")
    assert file.name == "1K_8dim_hnsw32-reranked32_100shortlist_float16.index"
    time = file.stat().st_mtime_ns
    assert serve(task, 8, shortlist=100, storage="float16")[0].stat().st_mtime_ns == time
    assert index.search(XQ, 10)[1].shape == (30, 10)


@pytest.mark.parametrize("make, complaint", [
    (lambda task: search(task, 33, 10), "has 32 dimensions, size 33 is past them"),
    (lambda task: search(task, 8, 401), "k=401 is not between 1 and the 400 vectors"),
    (lambda task: search(task._replace(index="hnsw16"), 8, 10), "unknown index 'hnsw16'"),
    (lambda task: rerank(task, 8, [64], [10]), "size 64 is past them"),
    (lambda task: rerank(task, 8, [32], [500]), "a shortlist of 500 is longer than the database, 400 vectors"),
    (lambda task: rerank(task, 8, [32], [50], k=20), "k=20: the list to begin with is shorter than"),
    (lambda task: serve(task, 8, 64), "size 64 is past them"),
    (lambda task: serve(task, 8, shortlist=5), "shortlist=5 is not between 10 and 400"),
    (lambda task: rerank(task, 8, [16, 32], [10, 20]), "must not grow"),
    (lambda task: rerank(task, 8, [16, 32], [10]), "as many sizes as shortlists"),
    (lambda task: score_list(task, "list.npy"), "the name of a neighbour list says")])
def test_what_does_not_fit_is_refused_and_leaves_no_list(task, tmp_path, make, complaint):
    with pytest.raises(InputError, match=complaint):
        make(task)
    assert files_under(tmp_path / "out") == []


def test_queries_of_another_width_are_refused(task):
    os.remove(f"{task.embeddings}/1K_val_mrl1_e0_ff32-X.npy")
    retrieval_world.write(task.embeddings, retrieval_world.world(400, 30, 16), splits=["val"])
    with pytest.raises(InputError, match=r"16 dimensions, the database 1K_train_mrl1_e0_ff32-X.npy has 32"):
        search(task, 8, 10)


def test_labels_that_do_not_fit_are_refused(task):
    file = search(task, 8, 10)
    np.save(f"{task.embeddings}/1K_val_mrl1_e0_ff32-y.npy", YQ[1:])
    with pytest.raises(InputError, match=r"\[29\] labels do not fit 30 embeddings"):
        score_list(task, file)
