"""neighbor_lists.py: names, reading the original's CSV, and lists that are made in resumable chunks."""
import numpy as np
import pytest
from neighbor_lists import Recipe, list_file, list_files, parse_list_file, read_list, write_list
from records import record_file

from mrl_files import InputError, read_json, write_json

RECIPES = {
    Recipe("exactl2", 16, 2048): "neighbors/mrl/exactl2_16dim_2048shortlist_1K.npy",
    Recipe("exactl2", 8, 200, (2048,), (200,)): "neighbors/reranked/mrl/8dim-reranked2048_200shortlist_1K_exactl2.npy",
    Recipe("ivf_sq8", 64, 50, (256,), (50,), "float16"):
        "neighbors/reranked/mrl/64dim-reranked256_50shortlist_float16_1K_ivf_sq8.npy",
    Recipe("hnsw32", 8, 200, (16, 32, 64, 128, 2048), (200, 100, 50, 25, 10)):
        "neighbors/funnel_retrieval/mrl/8dim-cascade[16,32,64,128,2048]_shortlist[200,100,50,25,10]_1K_hnsw32.npy"}


@pytest.mark.parametrize("recipe, name", RECIPES.items())
def test_names_are_the_originals_and_read_back(recipe, name):
    assert str(list_file("", recipe, "1K", "mrl")) == name
    assert parse_list_file(name) == (recipe, "1K")
    assert parse_list_file(name.replace(",", ", ").replace(".npy", ".csv")) == (recipe, "1K")
    assert parse_list_file(list_file("", recipe, "my.set_2", "ff")) == (recipe, "my.set_2")


@pytest.mark.parametrize("name", ["list.npy", "exactl2_16dim_1K.npy", "exactl2_16dim_20shortlist_1K.npy.json"])
def test_other_names_tell_nothing(name):
    assert parse_list_file(name) is None


def test_all_lists_of_a_data_set_and_model_are_found(tmp_path):
    for recipe, name in RECIPES.items():
        for path in (tmp_path / name, tmp_path / name.replace(",", ", ").replace(".npy", ".csv"),
                     list_file(tmp_path, recipe, "V2", "mrl"), list_file(tmp_path, recipe, "1K", "ff"),
                     record_file(tmp_path / name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    assert list_files(tmp_path, "1K", "mrl") == {tmp_path / name: recipe for recipe, name in RECIPES.items()}
    (tmp_path / RECIPES[Recipe("exactl2", 16, 2048)]).unlink()
    assert tmp_path / "neighbors/mrl/exactl2_16dim_2048shortlist_1K.csv" in list_files(tmp_path, "1K", "mrl")


def test_the_originals_csv_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("3,0,-1\n1,2,0\n")
    assert read_list(tmp_path / "a.csv", n=4, q=2).tolist() == [[3, 0, -1], [1, 2, 0]]


def test_a_list_that_is_not_wanted_does_not_hide_another_of_its_recipe(tmp_path):
    file = list_file(tmp_path, Recipe("exactl2", 16, 20), "1K", "mrl")
    file.parent.mkdir(parents=True)
    for path in (file, file.with_suffix(".csv")):
        path.write_text("")
    assert list(list_files(tmp_path, "1K", "mrl")) == [file]
    assert list(list_files(tmp_path, "1K", "mrl", lambda path, _: path.suffix == ".csv")) == [file.with_suffix(".csv")]
    assert list_files(tmp_path, "V2", "mrl") == {}


@pytest.mark.parametrize("text, complaint", [
    ("0,4\n1,2\n", "names row 4 of a database of 4"), ("0,-2\n1,2\n", "names row -2"),
    ("0,1\n", r"must hold integers \[2, k\], holds int32 \[1, 2\]"), ("a,b\n0,1\n", "not a CSV of integers"),
    ("0.5,1\n0,1\n", "not a CSV of integers"), ("0\n1,2\n", "not a CSV of integers"), ("", "not a CSV of integers")])
def test_a_list_that_does_not_fit_is_refused(tmp_path, text, complaint):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_list(tmp_path / "a.csv", n=4, q=2)


@pytest.mark.parametrize("ending", [".npy", ".csv"])
def test_an_interrupted_list_goes_on_with_the_first_chunk_not_done(tmp_path, ending):
    path, truth = tmp_path / f"list{ending}", np.arange(30).reshape(10, 3)
    asked = []

    def find(lo, hi):
        asked.append(lo)
        if asked == [0, 4]:
            raise KeyboardInterrupt
        return truth[lo:hi]
    with pytest.raises(KeyboardInterrupt):
        write_list(path, {"k": 3}, (10, 3), find, 4)
    assert not path.exists()
    write_list(path, {"k": 3}, (10, 3), find, 4, ms=2.5)
    assert asked == [0, 4, 4, 8]
    assert np.array_equal(read_list(path, n=30, q=10), truth)
    record = read_json(record_file(path))
    assert record["k"] == 3 and record["ms"] == 2.5 and record["seconds"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]


def test_a_half_made_list_of_other_embeddings_is_begun_again(tmp_path):
    def broken(lo, hi):
        if lo:
            raise KeyboardInterrupt
        return np.zeros((hi - lo, 3))
    with pytest.raises(KeyboardInterrupt):
        write_list(tmp_path / "list.npy", {"k": 3}, (10, 3), broken, 4)
    write_list(tmp_path / "list.npy", {"k": 4}, (10, 3), lambda lo, hi: np.ones((hi - lo, 3)), 4)
    assert (read_list(tmp_path / "list.npy", n=30, q=10) == 1).all()


def test_a_record_of_a_lost_file_does_not_speak_for_the_next(tmp_path):
    """Killed between the two renames of a list's end, and again in the first chunk of the next start."""
    partial = tmp_path / ".list.npy.partial.npy"
    write_json(record_file(partial), {"k": 3, "done": 10, "seconds": 1.0})

    def broken(lo, hi):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_list(tmp_path / "list.npy", {"k": 3}, (10, 3), broken, 4)
    write_list(tmp_path / "list.npy", {"k": 3}, (10, 3), lambda lo, hi: np.ones((hi - lo, 3)), 4)
    assert (read_list(tmp_path / "list.npy", n=30, q=10) == 1).all()


def test_lists_are_int32(tmp_path):
    write_list(tmp_path / "list.npy", {}, (2, 2), lambda lo, hi: np.zeros((hi - lo, 2), np.int64), 2)
    assert np.load(tmp_path / "list.npy").dtype == np.int32
