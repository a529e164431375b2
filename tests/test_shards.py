"""shards.py: two processes, this one the first, find what one pass finds; what stops one of them is one line."""
import signal

import numpy as np
import pytest
import retrieval_world
import retrieve
import shards
from forked import Forked, free_port
from neighbor_lists import read_list
from neighbors import search
from records import record_file
from retrieval_world import assert_nearest
from stages import ensure_neighbors, ensure_reranked, score
from study import Study, Task

from mrl_files import InputError, leave_group, read_json

WORLD = retrieval_world.world(1001, 40, 32)
XB, _, XQ, _ = WORLD
MERGED = 7 * 600 * 12 * 2      # bytes: seven queries of the longest lists below


def answer():
    """What torchrun's second process does: search its part, until it is told to end."""
    shards.MERGED = MERGED
    retrieve.main()


def in_group(process, port):
    """What torchrun sets in the environment of one of two processes."""
    return {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The second process, as torchrun starts it; this one has joined it as the first."""
    port = free_port()
    second = Forked(answer, **in_group(1, port))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MERGED", MERGED)
        for name, value in in_group(0, port).items():
            patch.setenv(name, value)
        try:
            assert shards.join()
            yield second
        finally:
            second.send_signal(signal.SIGKILL)
            second.wait()
            leave_group()      # else the tests after these would be in it too


@pytest.fixture
def task(other, tmp_path):
    return Task(str(retrieval_world.write(tmp_path / "in", WORLD)), str(tmp_path / "out"))


@pytest.mark.parametrize("memory_gb", [4, 100 * 16 * 4 / 1e9])
def test_two_processes_find_what_one_pass_finds(task, memory_gb):
    """In memory, and reading blocks of 100 rows; merged seven queries at a time; k is more than a part has."""
    file = ensure_neighbors(Study(task._replace(memory_gb=memory_gb)), 16, 600)
    I = np.load(file)
    assert_nearest(XB, XQ, 16, I)
    assert (I == search(XB, XQ, 16, 600)[1]).mean() > 0.99
    assert read_json(record_file(file))["processes"] == 2
    assert_nearest(XB, XQ, 32, np.load(ensure_reranked(Study(task), 16, [32], [600])), among=I)
    kept = {path.name for path in file.parents[2].glob("index_files/mrl/*.index")}
    assert kept == ({"1K_16dim_exactl2_part1of2.index", "1K_16dim_exactl2_part2of2.index"} if memory_gb == 4 else set())


@pytest.mark.parametrize("index, recall", [("hnsw32", 0.99), ("ivf_sq8", 0.95)])
def test_an_index_of_each_part(task, index, recall):
    study = Study(task._replace(index=index))
    file = ensure_neighbors(study, 16, 20)
    found, truth = np.load(file), search(XB, XQ, 16, 20)[1]
    assert np.mean([len({*a} & {*b}) / 20 for a, b in zip(found, truth, strict=True)]) > recall
    assert (found >= 501).any() and (found < 500).any()
    sizes = [path.stat().st_size for path in file.parents[2].glob(f"index_files/mrl/*{index}_part?of2.index")]
    row = score(study, file, [10])
    assert len(sizes) == 2 and row["bytes_per_vector"] == sum(sizes) / 1001 and row["build_s"] > 0
    written = file.stat().st_mtime_ns
    assert ensure_neighbors(study, 16, 20).stat().st_mtime_ns == written


def test_equal_distances_are_in_the_order_of_rows():
    D = [np.float32([[0, 1, 3]]), np.float32([[0, 1, 1]]), np.float32([[0.5, np.inf, np.inf]])]
    I = [np.array([[4, 2, 0]]), np.array([[7, 5, 6]]), np.array([[9, -1, -1]])]
    found_D, found_I = shards.merge([np.tile(d, (2, 1)) for d in D], [np.tile(i, (2, 1)) for i in I])
    assert found_D.tolist() == [[0, 0, 0.5]] * 2 and found_I.tolist() == [[4, 7, 9]] * 2
    D, I = shards.merge([np.float32([[0, 1, 1, 1]])] * 2, [np.array([[0, 1, 2, 3]]), np.array([[4, 5, 6, 7]])])
    assert I.tolist() == [[0, 4, 1, 2]]


def test_what_stops_the_other_process_is_raised_here_and_it_goes_on(task):
    bad = XB.copy()
    bad[900, 3] = np.nan
    retrieval_world.write(task.embeddings, (bad, *WORLD[1:]))
    with pytest.raises(InputError, match="the database: row 900 is not finite"):
        ensure_neighbors(Study(task), 16, 20)
    retrieval_world.write(task.embeddings, WORLD)
    assert_nearest(XB, XQ, 16, read_list(ensure_neighbors(Study(task), 16, 20), len(XB), len(XQ)))


def test_more_processes_than_vectors(task):
    retrieval_world.write(task.embeddings, (XB[:1], WORLD[1][:1], *WORLD[2:]))
    with pytest.raises(InputError, match="2 processes are more than the database has vectors"):
        ensure_neighbors(Study(task), 16, 1)


@pytest.mark.parametrize("split, of", [("train", "database"), ("val", "queries")])
def test_other_embeddings_on_another_machine(task, split, of):
    """As if the first process saw another file under the name."""
    study = Study(task)
    study.data(16).record[of]["rows"] = "0"
    with pytest.raises(InputError, match=rf"1K_{split}_mrl1_e0_ff32-X\.npy is another file than the first process's"):
        ensure_neighbors(study, 16, 20)


def test_a_process_that_was_killed(task, other):
    """The last test: it ends the second process."""
    other.send_signal(signal.SIGKILL)
    with pytest.raises(InputError, match="torchrun: one of the processes has ended before its time"):
        ensure_neighbors(Study(task), 16, 20)
