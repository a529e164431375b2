"""The run folder: what it holds, what is refused, what is never lost."""
import json

import checkpoint
import pytest
import torch
from forked import fork, statuses

from mrl_files import InputError

SETTINGS = {"model": {"mrl": 1}, "training": {"epochs": 3}, "data": {"num_workers": 2}}
STATE = {"epoch": 1, "model": {"w": torch.arange(1000.)}}


def test_save_and_restore(tmp_path):
    assert checkpoint.restore(tmp_path) is None
    checkpoint.save(tmp_path, STATE)
    checkpoint.save(tmp_path, STATE | {"epoch": 2})
    assert checkpoint.restore(tmp_path)["epoch"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


class OnGpu:
    """As much of a GPU's tensor as saving asks for."""

    def cpu(self):
        return torch.ones(2)


def test_final_weights_need_no_gpu(tmp_path):
    for name, file in (("", "final_weights.pt"), ("ema_", "final_weights_ema.pt")):
        checkpoint.save_weights(tmp_path, {"w": OnGpu()}, name)
        assert torch.equal(torch.load(tmp_path / file, weights_only=True)["w"], torch.ones(2))


@pytest.mark.parametrize("damage, said", [("half", "truncated"), ("cut", "truncated"), ("flip", "damaged"),
                                          ("foreign", "not a training checkpoint"), ("another's", "of another run")])
def test_a_broken_checkpoint_is_an_error_not_a_new_beginning(tmp_path, damage, said):
    checkpoint.write_params(tmp_path, SETTINGS, {"head": "mrl"})
    checkpoint.save(tmp_path, STATE)
    path = tmp_path / "checkpoint.pt"
    whole = bytearray(path.read_bytes())
    if damage == "half":
        path.write_bytes(b"half")
    elif damage == "cut":
        path.write_bytes(whole[:-200])
    elif damage == "flip":
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    elif damage == "foreign":
        torch.save({"some": "thing"}, path)
    else:
        checkpoint.write_params(tmp_path, SETTINGS, {"head": "mrl"})      # as in the folder of a run that began anew
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"checkpoint.pt: .*{said}.*choose another --logging.name"):
        checkpoint.restore(tmp_path)
    assert path.read_bytes() == before


def test_what_killed_saves_left_is_removed(tmp_path):
    checkpoint.save(tmp_path, STATE)
    (tmp_path / ".checkpoint.123.pt").write_bytes(b"half")
    assert checkpoint.restore(tmp_path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_one_run_at_a_time_trains_in_a_folder(tmp_path):
    def a_second():
        with pytest.raises(InputError, match="another process trains in it"), checkpoint.lock_folder(tmp_path):
            pass

    with checkpoint.lock_folder(tmp_path):
        assert statuses([fork(a_second)]) == [0]
    with checkpoint.lock_folder(tmp_path):
        pass


def test_what_does_not_change_results_may_change(tmp_path):
    checkpoint.write_params(tmp_path, SETTINGS, {"head": "mrl"})
    params = json.loads((tmp_path / "params.json").read_text())
    assert params["model"] == {"head": "mrl"} and params["versions"]["torch"] == torch.__version__ and params["command"]
    checkpoint.check_same_run(tmp_path, SETTINGS | {"data": {"num_workers": 12}}, {})
    with pytest.raises(InputError, match=r"--training.epochs=3, now 5"):
        checkpoint.check_same_run(tmp_path, SETTINGS | {"training": {"epochs": 5}}, {})
    with pytest.raises(InputError, match=r"--training.seed=None, now 1"):
        checkpoint.check_same_run(tmp_path, SETTINGS | {"training": {"epochs": 3, "seed": 1}}, {})
    newer = SETTINGS | {"training": {"epochs": 3, "seed": 0}}      # of an edition that has one setting more
    checkpoint.check_same_run(tmp_path, newer, {"training.seed": 0})
    with pytest.raises(InputError, match=r"--training.seed=1, now 0"):
        checkpoint.check_same_run(tmp_path, newer, {"training.seed": 1})
    with pytest.raises(InputError, match="no run folder"):
        checkpoint.saved_settings(tmp_path / "elsewhere")
