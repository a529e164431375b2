"""Which process is which, and what cannot start; the commands themselves are in test_train_commands and test_resume."""
import os
import signal
import time
from types import SimpleNamespace

import launch
import pytest
from forked import free_port

from mrl_files import InputError, rank


def settings():
    training = SimpleNamespace(device="cpu", distributed=1)
    return SimpleNamespace(training=training, dist=SimpleNamespace(world_size=2, address="localhost", port="0"))


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(GROUP_WORLD_SIZE="2") sets what torchrun sets in the environment of its processes."""
    def start(**changes):
        usual = {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
                 "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for name, value in (usual | changes).items():
            monkeypatch.setenv(name, value)
    return start


def killed(device, settings):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_named(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    wanted = settings()
    wanted.dist.port = str(free_port())
    with pytest.raises(InputError, match=r"process \d was ended by SIGKILL \(out of memory\?\).*--training.resume="):
        launch.spawn(killed, wanted)


def ended_one_by_one(device, settings, folder):
    launch.wait()      # both are there
    if rank():
        time.sleep(1)
        (folder / "ended by itself").touch()
    os._exit(143)      # now, not after Python has tidied up


@pytest.mark.skipif(not launch.GRACE, reason="this PyTorch ends the others at once")
def test_the_others_get_time_to_end(monkeypatch, tmp_path, caplog):
    """Else PyTorch ends them, and says so after a stop that went as it should."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    wanted = settings()
    wanted.dist.port = str(free_port())
    with pytest.raises(SystemExit, match="143"):
        launch.spawn(ended_one_by_one, wanted, tmp_path)
    assert (tmp_path / "ended by itself").exists() and not caplog.records


def test_a_clusters_own_variables_do_not_count(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch.is_first() and launch.world_size(settings()) == 2


def test_torchruns_do(torchrun):
    torchrun()
    assert not launch.is_first() and launch.world_size(settings()) == 4
    launch.check_devices(settings())


def test_restarts_on_several_nodes_need_a_store_of_their_own(torchrun):
    torchrun(GROUP_WORLD_SIZE="2")
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        launch.check_devices(settings())
    for enough in ({"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        torchrun(GROUP_WORLD_SIZE="2", **enough)
        launch.check_devices(settings())


def test_more_processes_than_gpus(torchrun, monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    wanted = settings()
    wanted.training.device = "cuda"
    with pytest.raises(InputError, match=r"--dist.world_size=2: this machine shows 1 GPUs"):
        launch.check_devices(wanted)
    torchrun()
    with pytest.raises(InputError, match="--nproc_per_node=2: this machine shows 1 GPUs"):
        launch.check_devices(wanted)
