"""The three notebooks of retrieval/ run in their order on small arrays, and are thin: settings, calls, no results."""
import nbformat
import numpy as np
import pytest
import retrieval_world
from conftest import ROOT
from retrieval_world import assert_nearest

NAMES = ["faiss_nn", "reranking", "compute_metrics"]
WORLD = retrieval_world.world(300, 20, 32)
SETTINGS = {
    "faiss_nn": {"k": 100},
    "reranking": {"k": 100, "shortlists": [[70, 60, 50, 30, 10], [100, 80, 60, 20, 10]]},      # the last two count
    "compute_metrics": {"shortlist": [10, 25]}}


@pytest.fixture
def execute(notebook, tmp_path):
    """execute("faiss_nn", k=5) -> what its cells showed, as HTML."""
    def start(name, **settings):
        shown = notebook(f"retrieval/{name}", root=f"{tmp_path}/in", output=str(tmp_path), **SETTINGS[name] | settings)
        return "".join(str(output.get("data", {}).get("text/html", "")) for output in shown)
    return start


def test_the_notebooks_run_one_after_another(execute, tmp_path):
    retrieval_world.write(tmp_path / "in", WORLD)
    assert "exactl2_8dim_100shortlist_1K.npy" in execute("faiss_nn")
    I = np.load(tmp_path / "neighbors/mrl/exactl2_8dim_100shortlist_1K.npy")
    assert_nearest(WORLD[0], WORLD[2], 8, I)
    assert "8dim-cascade[16,32]_shortlist[20,10]" in execute("reranking")
    execute("reranking", funnel=False, shortlist=40, rerank_dims=[32])
    adaptive = np.load(tmp_path / "neighbors/reranked/mrl/8dim-reranked32_40shortlist_1K_exactl2.npy")
    assert_nearest(WORLD[0], WORLD[2], 32, adaptive, among=I[:, :40])
    shown = execute("compute_metrics")
    assert [shown.count(f">{kind}<") for kind in ("single-shot", "adaptive", "funnel")] == [3, 1, 2]
    top1 = (WORLD[1][I[:, 0]] == WORLD[3]).mean()
    assert f"{top1:.2%}" in shown


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_settings_and_calls(name):
    notebook = nbformat.read(ROOT / f"retrieval/{name}.ipynb", 4)
    assert notebook.cells[0].metadata.tags == ["parameters"]
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
        assert "def " not in cell.source and len(cell.source.splitlines()) <= 12
