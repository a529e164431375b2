"""Names of the design, guarded against mixing runs; the original's arrays read where they are exact."""
import json
import os

import numpy as np
import pytest
import saved_files
import torch
from saved_files import (
    accuracy_path,
    arrays_stem,
    check_free,
    fingerprint,
    outputs_path,
    read_arrays,
    save_tensor,
)

from mrl_files import InputError

MRL = {"head": "mrl", "nesting_list": [8, 2048]}
MRL_E = {"head": "mrl_e", "nesting_list": [8, 2048]}
FF = {"head": "ff256", "nesting_list": [256]}


def test_names():
    assert outputs_path(".", MRL, "V1", False, "softmax").name == \
        "mrl=True_efficient=False_ff=2048_dataset=V1_tta=False_softmax.pth"
    assert outputs_path(".", MRL_E, "A", True, "logits").name == \
        "mrl=True_efficient=True_ff=2048_dataset=A_tta=True_logits.pth"
    assert outputs_path(".", FF, "V2", 0, "predictions").name == \
        "mrl=False_efficient=False_ff=256_dataset=V2_tta=False_predictions.pth"
    assert outputs_path(".", FF, "V2", 0, "gt").name == "gt_dataset=V2.pth"
    assert accuracy_path(".", FF, "V2", 0, "0f").name == \
        "mrl=False_efficient=False_ff=256_dataset=V2_tta=False_accuracy_0f.json"
    assert arrays_stem("x", "4K", "train", "mrl1_e1_ff2048").as_posix() == "x/4K_train_mrl1_e1_ff2048"


def test_saved_tensors_are_memory_mapped_plain_tensors(tmp_path):
    path, tensor = tmp_path / "t.pth", torch.rand(2, 3, 4)
    save_tensor(path, tensor, {"checkpoint": "0f"})
    assert torch.load(path, mmap=True, weights_only=True).equal(tensor)
    assert json.loads((tmp_path / "t.json").read_text()) == {"checkpoint": "0f"}


def test_a_tensor_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"none/t.pth could not be written"):
        save_tensor(tmp_path / "none" / "t.pth", torch.zeros(1), {})
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_run_are_not_replaced(tmp_path):
    companion = tmp_path / "x.json"
    check_free(companion, {"checkpoint": "new"}, overwrite=False)
    companion.write_text('{"checkpoint": "old", "n": 3}')
    check_free(companion, {"checkpoint": "old"}, overwrite=False)
    check_free(companion, {"checkpoint": "new"}, overwrite=True)
    with pytest.raises(InputError, match=r"x.json says .* checkpoint=old, not new: .*--overwrite"):
        check_free(companion, {"checkpoint": "new"}, overwrite=False)
    companion.write_text("{")
    with pytest.raises(InputError, match=r"x.json: not a JSON file"):
        check_free(companion, {"checkpoint": "new"}, overwrite=False)


def test_files_of_unknown_origin_are_not_replaced(tmp_path):
    """The original's: the names are ours, and no JSON lies beside them."""
    file, companion = tmp_path / "gt_dataset=V1.pth", tmp_path / "gt_dataset=V1.json"
    check_free(companion, {"n": 3}, False, file)
    file.write_text("the original's")
    with pytest.raises(InputError, match=r"V1.pth: nothing beside it says .*gt_dataset=V1.json.*--overwrite"):
        check_free(companion, {"n": 3}, False, file)
    check_free(companion, {"n": 3}, True, file)


@pytest.mark.parametrize("stop", ["save", "write_json", "replace"])
def test_a_tensor_stopped_while_it_is_replaced_is_whole_or_gone(tmp_path, monkeypatch, stop):
    """At no moment does it lie beside the JSON of another, or beside none."""
    path, companion, old = tmp_path / "t.pth", tmp_path / "t.json", torch.zeros(2)
    save_tensor(path, old, {"checkpoint": "old"})
    owner = {"save": torch, "write_json": saved_files, "replace": os}[stop]
    real = getattr(owner, stop)

    def interrupted(*args):
        if stop == "replace" and args[1] == companion:
            return real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, stop, interrupted)
        save_tensor(path, torch.ones(2), {"checkpoint": "new"})
    assert not path.exists() or (torch.load(path).equal(old) and "old" in companion.read_text())
    save_tensor(path, torch.ones(2), {"checkpoint": "new"})
    assert torch.load(path).equal(torch.ones(2)) and "new" in companion.read_text()


def test_fingerprint_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == "ba7816bf8f01cfea"             # the well-known SHA-256 of "abc"


def test_original_arrays_are_read_where_exact(tmp_path):
    X, y = np.ones((3, 4), np.float32), np.array([[0], [999], [2047]], np.float16)
    np.save(tmp_path / "1K_val_mrl1_e0_ff2048-X.npy", X)
    np.save(tmp_path / "1K_val_mrl1_e0_ff2048-y.npy", y)
    got_X, got_y, about = read_arrays(tmp_path, "1K", "val", "mrl1_e0_ff2048")
    assert got_y.tolist() == [0, 999, 2047] and got_y.dtype == np.int64 and about == {}
    np.testing.assert_array_equal(got_X, X)


def test_arrays_that_do_not_fit_or_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"1K_val_m-X.npy.*--retrieval"):
        read_arrays(tmp_path, "1K", "val", "m")
    np.save(tmp_path / "1K_val_m-X.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "1K_val_m-y.npy", np.arange(4))
    with pytest.raises(InputError, match=r"\[4\] labels do not fit 3 embeddings"):
        read_arrays(tmp_path, "1K", "val", "m")
