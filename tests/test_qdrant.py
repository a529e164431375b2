"""Qdrant in its local mode gives the lists of our own funnel; what goes wrong is one line."""
import json
import sys
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import neighbors
import numpy as np
import pytest
import qdrant
import rerank
import retrieval_world
import retrieve
from forked import free_port
from qdrant import Collection
from records import record_file
from retrieval_world import assert_nearest, distances
from stages import ensure_qdrant, ensure_reranked, score, score_all
from study import Study, Task

from mrl_files import InputError, read_json

SIZES = (8, 16, 32)
WORLD = retrieval_world.world(2000, 15, 32)
SMALL = retrieval_world.world(300, 5, 32, seed=1)
TINY = retrieval_world.world(60, 3, 32, seed=2)      # to be kept on disk


@pytest.fixture
def client():
    with closing(qdrant.connect()) as client:
        yield client


@pytest.fixture(scope="module")
def filled():
    """A client whose collection "w" holds WORLD."""
    with closing(qdrant.connect()) as client:
        qdrant.upload(client, Collection("w", SIZES), WORLD[0], {})
        yield client


def assert_same(xb, xq, dim, found, expected):
    """The same rows, where not equally near to 1e-6."""
    truth = distances(xb, xq, dim)
    near, as_near = (np.take_along_axis(truth, I, 1) for I in (found, expected))
    np.testing.assert_allclose(near, as_near, atol=1e-6)
    assert (found == expected)[np.abs(np.diff(as_near, prepend=-1, append=9)).min(1) > 1e-6].all()


@pytest.mark.parametrize("rerank_dims, shortlists", [([32], [100]), ([16, 32], [200, 20]), ([8, 16, 32], [60, 30, 10])])
def test_its_lists_are_our_funnels(filled, rerank_dims, shortlists):
    xb, _, xq, _ = WORLD
    _, first = neighbors.search(xb, xq, 8, shortlists[0])
    expected = rerank.funnel(xb, xq, first, rerank_dims, shortlists)
    assert_same(xb, xq, 32, qdrant.query(filled, "w", xq, 8, rerank_dims, shortlists), expected)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_collection_has_a_graph_at_its_smallest_size_and_lies_on_disk(client, quantize):
    """And, if asked for, a copy of that size in memory, of 8 bits a number."""
    qdrant.upload(client, Collection("w", SIZES, quantize=quantize), SMALL[0], {})
    vectors = client.get_collection("w").config.params.vectors
    assert {size: v.hnsw_config.m for size, v in vectors.items()} == {"8": qdrant.LINKS, "16": 0, "32": 0}
    assert all(v.on_disk for v in vectors.values())
    copies = {size: v.quantization_config.scalar for size, v in vectors.items() if v.quantization_config}
    assert {size: (scalar.type, scalar.always_ram) for size, scalar in copies.items()} == (
        {"8": ("int8", True)} if quantize else {})
    stored = client.retrieve("w", [7], with_vectors=["16"])[0].vector["16"]
    np.testing.assert_array_equal(np.float32(stored), neighbors.unit(SMALL[0][7:8], 16)[0])


def test_vectors_of_zeros_are_found_last(client, capsys):
    xb, xq = np.abs(SMALL[0]), np.abs(SMALL[2])
    xb[[5, 200], :8] = 0
    qdrant.upload(client, Collection("w", SIZES), xb, {})
    assert "2 of 300 vectors of the database are zero in their first 8 numbers" in capsys.readouterr().err
    found = qdrant.query(client, "w", xq, 8, [8], [300])
    assert (np.sort(found[:, -2:]) == [5, 200]).all()


def test_an_interrupted_upload_goes_on(client, monkeypatch):
    xb, _, xq, _ = SMALL
    uploaded, upsert = [], client.upsert

    def stop_at_the_second(name, batch, **options):
        if len(uploaded) == 1:
            raise KeyboardInterrupt
        uploaded.append(batch.ids)
        return upsert(name, batch, **options)
    monkeypatch.setattr(client, "upsert", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        qdrant.upload(client, Collection("w", SIZES), xb, {})
    # A part of the second batch: what shards that were quicker than others leave.
    upsert("w", qdrant.batch_rows(xb[200:210], SIZES, 200, neighbors.Zeros(8)))
    monkeypatch.setattr(client, "upsert", lambda name, batch, **options: uploaded.append(batch.ids)
                        or upsert(name, batch, **options))
    qdrant.upload(client, Collection("w", SIZES), xb, {})
    assert [ids[0] for ids in uploaded] == [0, 128, 256]
    assert_nearest(xb, xq, 32, qdrant.query(client, "w", xq, 8, [32], [300]))
    qdrant.upload(client, Collection("w", SIZES), xb, {})
    assert len(uploaded) == 3


@pytest.mark.parametrize("other, record, complaint", [
    (Collection("w", (8, 32)), {"rows": "a"}, r"holds the sizes \[8, 16, 32\], not \[8, 32\]; name them after --sizes"),
    (Collection("w", SIZES, quantize=True), {"rows": "a"}, "was made without --quantize; leave that as it was"),
    (Collection("w", SIZES, shards=6), {"rows": "a"}, "has None where --shards is 6; leave the flag out"),
    (Collection("w", SIZES), {"rows": "b"}, "was made from other embeddings")])
def test_another_collection_under_the_name(client, other, record, complaint):
    qdrant.upload(client, Collection("w", SIZES), SMALL[0], {"rows": "a"})
    with pytest.raises(InputError, match=complaint):
        qdrant.upload(client, other, SMALL[0], record)
    assert client.count("w").count == 300


def test_a_collection_with_more_points_than_rows(client):
    qdrant.upload(client, Collection("w", SIZES), SMALL[0], {})
    with pytest.raises(InputError, match="has 300 points, the database 200"):
        qdrant.upload(client, Collection("w", SIZES), SMALL[0][:200], {})


def test_more_or_fewer_parts_than_a_collection_has(client):
    """As a server describes it: local mode has none."""
    qdrant.upload(client, Collection("w", SIZES), SMALL[0][:1], {})
    params = client.get_collection("w").config.params
    params.shard_number, params.replication_factor = 6, 2
    find = partial(qdrant.find_difference, params)
    assert find(Collection("w", SIZES)) is find(Collection("w", SIZES, 6, 2)) is None
    assert find(Collection("w", SIZES, 3)) == "has 6 where --shards is 3; leave the flag out,"
    assert find(Collection("w", SIZES, 6, 1)) == "has 2 where --replicas is 1; leave the flag out,"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")   # the client leaves its lock open
def test_a_folder_in_use(tmp_path):
    with closing(qdrant.connect(path=str(tmp_path / "store"))), pytest.raises(InputError, match="already accessed by"):
        qdrant.connect(path=str(tmp_path / "store"))


# ------------------------------------------------------------------------------------------------ the command

def ask(folder, output, words):
    """The command in this process."""
    retrieve.run_command(retrieve.arguments().parse_args(
        ["qdrant", "--embeddings", str(folder), "--output", str(output), *words.split()]))


def test_the_command_writes_lists_that_metrics_reads(run_here, tmp_path):
    folder = retrieval_world.write(tmp_path / "in", TINY, nesting_list=list(SIZES))
    where = f"--embeddings {folder} --output {tmp_path} --path {tmp_path / 'store'}"
    done = run_here("retrieval", f"retrieve.py qdrant {where} --retrieval_dim 8 --rerank_dims 16 32 --shortlists 50 10")
    file = Path(done.stdout.strip())
    assert file == tmp_path / "neighbors/funnel_retrieval/mrl/8dim-cascade[16,32]_shortlist[50,10]_1K_qdrantlocal.npy"
    assert "slow" in done.stderr
    study = Study(Task(embeddings=str(folder), output=str(tmp_path)))
    ours = ensure_reranked(study, 8, [16, 32], [50, 10], k=50)
    assert_same(TINY[0], TINY[2], 32, np.load(file), np.load(ours))
    row, expected = score(study, file, [10]), score(study, ours, [10])
    assert row["index"] == "qdrantlocal" and row["mAP@10"] == pytest.approx(expected["mAP@10"])
    assert {"database", "queries"} <= set(read_json(record_file(file)))


def test_a_list_that_is_there_needs_no_server(tmp_path, capsys, monkeypatch):
    """Quantized or not, the lists have names of their own. (Local mode stands in for the server.)"""
    folder = retrieval_world.write(tmp_path / "in", SMALL)
    connect = qdrant.connect
    for words, index in (("", "qdrant"), ("--quantize", "qdrant_sq8")):
        asked = f"--url http://nowhere:1 --retrieval_dim 8 --rerank_dims 32 --shortlists 50 {words}"
        monkeypatch.setattr("qdrant.connect", lambda url, path: connect())
        ask(folder, tmp_path, asked)
        made = capsys.readouterr().out
        assert made == f"{tmp_path}/neighbors/reranked/mrl/8dim-reranked32_50shortlist_1K_{index}.npy\n"
        monkeypatch.setattr("qdrant.connect", None)
        ask(folder, tmp_path, asked)
        assert capsys.readouterr().out == made
    study = Study(Task(embeddings=str(folder), output=str(tmp_path)))
    assert [row["index"] for row in score_all(study, [10])] == ["qdrant", "qdrant_sq8"]


def test_other_embeddings_are_refused_and_their_lists_left(tmp_path):
    asked = {"retrieval_dim": 8, "rerank_dims": [32], "shortlists": [20], "path": str(tmp_path / "store")}
    task = Task(embeddings=str(retrieval_world.write(tmp_path / "in", TINY)), output=str(tmp_path))
    file = ensure_qdrant(Study(task), **asked)
    retrieval_world.write(tmp_path / "in", retrieval_world.world(60, 3, 32, seed=3))
    with pytest.raises(InputError, match="collection 1K_mrl was made from other embeddings"):
        ensure_qdrant(Study(task), **asked)
    old = np.load(file)
    assert ensure_qdrant(Study(task), **asked, name="new") == file       # made again: its record did not fit
    assert (np.load(file) != old).any()


@pytest.mark.parametrize("flags, complaint", [
    ("--url http://localhost:{port}", "--url: the Qdrant server does not answer"),
    ("--url nonsense:1", "nonsense:1: Unknown scheme"),
    ("--sizes 8 16", r"the query compares at \[8, 32\]; name them all"),
    ("--sizes 4 8 32", r"--retrieval_dim 8: must be the smallest of \[4, 8, 32\]"),
    ("--rerank_dims 64", "size 64 is past them"),
    ("--shortlists 301", "k=301 is not between 1 and the 300 vectors"),
    ("--shards 2", "local mode knows none of them; --url names a server"),
    ("--quantize", "local mode knows none of them; --url names a server")])
def test_bad_input_is_one_line(tmp_path, flags, complaint):
    folder = retrieval_world.write(tmp_path / "in", SMALL)
    with pytest.raises(InputError, match=complaint):
        ask(folder, tmp_path, "--retrieval_dim 8 --rerank_dims 32 --shortlists 50 " + flags.format(port=free_port()))
    assert not [*tmp_path.rglob("*dim*.npy")]


@pytest.mark.parametrize("flag", ["--index hnsw32", "--memory_gb 1", "--device cpu", "--nlist 8"])
def test_what_qdrant_does_not_use_is_no_flag_of_its(flag, capsys):
    with pytest.raises(SystemExit):
        ask("in", "out", f"--retrieval_dim 8 --rerank_dims 32 --shortlists 50 {flag}")
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(InputError, match="pip install qdrant-client"):
        qdrant.connect()


# ------------------------------------------------------------------------------------------------ a server's part

class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"status": {"error": "Invalid API key"}}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_that_refuses():
    with HTTPServer(("localhost", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with closing(qdrant.connect(f"http://localhost:{server.server_port}")) as client:
                with pytest.raises(InputError, match=r"refuses \(403, collection w\).*Invalid API key.*QDRANT_API_KEY"):
                    qdrant.upload(client, Collection("w", SIZES), SMALL[0], {})
        finally:
            server.shutdown()
            thread.join()
