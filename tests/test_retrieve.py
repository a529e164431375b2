"""retrieve.py as a user runs it: the documented commands, and one line for bad input."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import retrieval_world
import retrieve as retrieve_module
from conftest import ROOT, with_python
from retrieval_world import assert_nearest

WORLD = retrieval_world.world(900, 40, 32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieve")
    return retrieval_world.write(folder / "in", WORLD, nesting_list=[4, 8, 16, 32]), folder / "out"


@pytest.fixture
def retrieve(run_here, folders):
    def start(command):
        return run_here("retrieval", f"retrieve.py {command} --embeddings {folders[0]} --output {folders[1]}")
    return start


@pytest.fixture
def refusal(refused, folders):
    def start(command):
        return refused("retrieval", f"retrieve.py {command} --embeddings {folders[0]} --output {folders[1]}")
    return start


def test_search_rerank_funnel_metrics_and_index(retrieve, folders):
    xb, yb, xq, yq = WORLD
    out = folders[1]
    single = Path(retrieve("search --sizes 8 --k 100").stdout.strip())
    assert single == out / "neighbors/mrl/exactl2_8dim_100shortlist_1K.npy"
    among = np.load(single)
    assert_nearest(xb, xq, 8, among)
    adaptive = retrieve("rerank --retrieval_dim 8 --rerank_dims 16 32 --shortlist 100").stdout.split()
    assert [Path(f).name for f in adaptive] == ["8dim-reranked16_100shortlist_1K_exactl2.npy",
                                                "8dim-reranked32_100shortlist_1K_exactl2.npy"]
    assert_nearest(xb, xq, 32, np.load(adaptive[1]), among=among)
    funnels = retrieve("funnel --retrieval_dim 8 --rerank_dims 16 32 --shortlists 100 10 --shortlists 50 10 --csv "
                       "--k 100").stdout.split()
    assert [Path(f).name for f in funnels] == ["8dim-cascade[16,32]_shortlist[100,10]_1K_exactl2.csv",
                                               "8dim-cascade[16,32]_shortlist[50,10]_1K_exactl2.csv"]
    printed = retrieve("metrics --ks 10 50").stdout
    table = pd.read_csv(out / "report/1K_mrl_metrics.csv")
    assert table.method.tolist() == ["single-shot", "adaptive", "adaptive", "funnel", "funnel"]
    assert table.top1[0] == pytest.approx((yb[among[:, 0]] == yq).mean())
    assert f"{100 * table.top1[0]:.4g}" in printed
    file = Path(retrieve("index --retrieval_dim 8 --index hnsw32 --shortlist 50").stdout.strip())
    assert file.name == "1K_8dim_hnsw32-reranked32_50shortlist_float32.index" and file.exists()


def test_report(retrieve, folders):
    printed = retrieve("report --index exactl2 hnsw8 --shortlist 50").stdout
    assert printed.count("single-shot") == 8 and printed.count("adaptive") == 12
    assert {p.name for p in (folders[1] / "report").iterdir()} >= {
        "1K_mrl_report.csv", "1K_mrl_size.png", "1K_mrl_cost.png"}


def test_without_a_folder_for_compiled_code(folders, tmp_path):
    """A checkout that cannot be written to, and no usable home (for root too): numba finds nowhere to keep anything."""
    for path in [*(ROOT / "retrieval").glob("*.py"), *(ROOT / "retrieval").glob("*.csv")]:
        shutil.copy(path, tmp_path)
    (tmp_path / "__pycache__").write_text("a file: no folder can be made here")
    caches = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache", "NUMBA_CACHE_DIR": ""}
    words = f"rerank --retrieval_dim 4 --rerank_dims 32 --shortlist 20 --k 20 --embeddings {folders[0]} --output out"
    done = subprocess.run([sys.executable, "retrieve.py", *words.split()], cwd=tmp_path, env=with_python(**caches),
                          capture_output=True, text=True, check=True)
    among = np.load(tmp_path / "out/neighbors/mrl/exactl2_4dim_20shortlist_1K.npy")
    assert_nearest(WORLD[0], WORLD[2], 32, np.load(tmp_path / done.stdout.strip()), among=among)


@pytest.mark.parametrize("command, complaint", [
    ("search --dataset 5K", "5K_train_mrl1_e0_ff<size>-X.npy: no such file"),
    ("funnel --retrieval_dim 8 --rerank_dims 16 32 --shortlists 10 20", "must not grow")])
def test_bad_input_is_one_line(refusal, command, complaint):
    assert complaint in refusal(command)


@pytest.mark.parametrize("command", retrieve_module.COMMANDS)
def test_each_commands_help_ends_with_an_example(command, capsys, monkeypatch):
    """In lines of 120 at most; what the search is of stands before how it runs."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["retrieve.py", command, "--help"])
    with pytest.raises(SystemExit):
        retrieve_module.arguments().parse_args()
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    assert said.splitlines()[-1].startswith(f"  python retrieve.py {command}")
    assert said.index("\n  --embeddings") < said.index("\n  --model") < said.index("\n  --output")
