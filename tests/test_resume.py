"""Interrupted and resumed training against the run that nobody touched: equal to the bit on a CPU."""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import checkpoint
import kill_and_resume
import launch
import pytest
import torch
import train_imagenet
from forked import Forked, fork, free_port, run_torchrun, statuses, wait_for

import mrl_models
from mrl_files import InputError


def command(data, logs, name, *changes):
    return kill_and_resume.command(data, logs, name, "--model.arch=shufflenet_v2_x0_5", *changes)


def start(words):
    return Forked("train/train_imagenet.py", *words[2:])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return kill_and_resume.make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ffcv(noise):
    return noise(24) / "data.ffcv"


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """train(name, *flags) runs train_imagenet.main in this process -> its run folder."""
    def start(name, *flags):
        words = command(images, tmp_path, name, "--training.epochs=2", *flags)
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        train_imagenet.main()
        return tmp_path / name
    return start


def stop_after(monkeypatch, steps):
    """The next run is asked to stop after so many steps."""
    left = iter(range(steps - 1, -1, -1))
    monkeypatch.setattr(launch.StopRequest, "asked", lambda self: 0 if next(left, 0) else int(signal.SIGTERM))


def log(folder):
    times = ("timestamp", "relative_time", "train_time", "val_time", "images_per_second", "waiting_for_data",
             "peak_memory_mb", "waiting_most")
    return [{k: v for k, v in json.loads(line).items() if k not in times}
            for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize("data, flags, steps, stops", [
    ("images", (), 2, 2), ("ffcv", (), 2, 1), ("images", kill_and_resume.RECIPE, 1, 2)],
    ids=["images", "ffcv", "recipe"])
def test_a_stopped_run_goes_on_to_the_same_weights(data, flags, steps, stops, train, request, monkeypatch, capsys):
    """Stopped in its first epoch, and after it; of three batches each, the recipe's first two to one step."""
    path = request.getfixturevalue(data)
    flags = [f"--data.train_dataset={path}", f"--data.val_dataset={path}", *flags]
    whole = train("whole", *flags)
    folder, resumed = whole.parent / "stopped", ["train_imagenet.py", f"--training.resume={whole.parent}/stopped"]
    for start in (lambda: train("stopped", *flags), train_imagenet.main)[:stops]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_after(patch, steps)
            start()
        assert stopped.value.code == 128 + signal.SIGTERM
        assert f"--training.resume={folder}" in capsys.readouterr().err and not (folder / "final_weights.pt").exists()
        monkeypatch.setattr(sys, "argv", resumed)
    train_imagenet.main()
    assert kill_and_resume.same(kill_and_resume.weights(folder), kill_and_resume.weights(whole))
    assert log(folder) == log(whole)
    state, keys = torch.load(folder / "checkpoint.pt"), {"format", "run", "model", "optimizer", "scaler", "rng",
                                                         "losses", "epoch", "step", "elapsed"}
    averaged = {"ema"} if "--training.ema=0.9" in flags else set()      # without: as it was before there were averages
    assert state.keys() == keys | averaged


def test_the_average_is_validated_and_saved(train, capsys):
    folder = train("run", "--training.epochs=1", "--training.ema=0.5", "--training.optimizer=adamw", "--lr.lr=0.05")
    assert capsys.readouterr().err.count("warning: --lr.lr=0.05 is a rate for SGD") == 1
    (record,) = map(json.loads, (folder / "log").read_text().splitlines())
    assert record["ema_val_loss_8"] != record["val_loss_8"] and 0 <= record["ema_top_1_8"] <= record["ema_top_5_8"] == 1
    average, last = (mrl_models.load_model(folder / f"final_weights{end}.pt") for end in ("_ema", ""))
    assert average.spec == last.spec and not torch.equal(average.conv1[0].weight, last.conv1[0].weight)
    ema = torch.load(folder / "checkpoint.pt")["ema"]
    assert ema["n_averaged"] == 3 and torch.equal(ema["module.conv1.0.weight"], average.conv1[0].weight)


def test_a_run_goes_on_only_as_it_began(train, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 1)
        train("run")
    with pytest.raises(InputError, match=r"began with --lr.lr=0.01, now 0.02"):
        train("run", "--lr.lr=0.02")
    folder = train("run")      # the same command again goes on
    with pytest.raises(InputError, match="this run is finished"):
        train("run")
    assert (folder / "final_weights.pt").exists()


def test_a_second_process_is_kept_out_of_a_run(train, tmp_path):
    def hold():
        with checkpoint.lock_folder(tmp_path / "run"):
            (tmp_path / "held").touch()
            time.sleep(100)

    holder = fork(hold)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(InputError, match="another process trains in it"):
        train("run")
    os.kill(holder, signal.SIGKILL)
    assert statuses([holder]) == [-signal.SIGKILL]


def test_a_killed_run_ends_alike(train, images, tmp_path, monkeypatch):
    """In its second or third epoch of four, or while a checkpoint of these is written."""
    monkeypatch.setattr(kill_and_resume, "start", start)
    words = command(images, tmp_path, "run", "--training.epochs=4")
    assert kill_and_resume.kill_at_random(words, tmp_path / "run", random.Random(1)) != "finished"
    run, whole = (kill_and_resume.weights(train(name, "--training.epochs=4")) for name in ("run", "whole"))
    assert kill_and_resume.same(run, whole)


def test_ctrl_c_finishes_the_step_and_saves(images, tmp_path):
    process = start(command(images, tmp_path, "run", "--training.epochs=500"))
    wait_for_epochs(1, tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in stderr
    assert "go on with --training.resume=" in stderr


def test_two_processes_asked_to_stop_save_first(images, tmp_path):
    """Ctrl-C, which each process hears twice: from the terminal and from the first. (`kill`: test_gpu_rehearsal.py.)"""
    process = start(command(images, tmp_path, "run", "--training.epochs=500", "--training.batch_size=6",
                            "--training.distributed=1", "--dist.world_size=2", f"--dist.port={free_port()}"))
    wait_for_epochs(1, tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in stderr, stderr
    assert stderr.count("go on with --training.resume=") == 1


def wait_for_epochs(epochs, folder, *processes):
    """For the checkpoint after so many; all processes have to be running until then."""
    while not (folder / "checkpoint.pt").exists() or len(log(folder)) < epochs:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.02)


def torchrun(images, logs, nodes, epochs):
    """-> the run folder of two gloo processes, of which one was killed when so many epochs of four were done."""
    words = command(images, logs, "", "--training.epochs=4", "--training.batch_size=6")[2:]
    words.remove("--logging.name=")
    settings = {"min_nodes": nodes, "max_nodes": nodes, "nproc_per_node": 2 // nodes, "max_restarts": 1,
                "rdzv_backend": "c10d", "rdzv_endpoint": f"localhost:{free_port()}", "run_id": "run",
                "monitor_interval": 0.1}
    agents = [Forked(run_torchrun, settings, "train/train_imagenet.py", *words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
              for _ in range(nodes)]
    wait_for_epochs(epochs, logs / "run", *agents)
    killed = sorted(children(agents[-1].pid))[-1]
    for pid in (*children(killed), killed):      # its DataLoader's would keep its connections open for 5 s
        os.kill(pid, signal.SIGKILL)
    output = "".join(part for agent in agents for part in agent.communicate())
    assert not any(agent.returncode for agent in agents), output[-9000:]
    assert output.count("run folder:") == 2
    return logs / "run"


def test_what_the_first_refuses_ends_torchruns_others_at_once(images, tmp_path):
    """They wait for it, and would hear of no SIGTERM but in 30 s of SIGKILL."""
    (tmp_path / "run").mkdir()
    checkpoint.write_params(tmp_path / "run", {"training": {"seed": 5}}, {})
    words = command(images, tmp_path, "", "--training.batch_size=6")[2:]
    words.remove("--logging.name=")
    settings = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0, "rdzv_backend": "c10d",
                "rdzv_endpoint": f"localhost:{free_port()}", "run_id": "run", "monitor_interval": 0.1}
    said = "".join(Forked(run_torchrun, settings, "train/train_imagenet.py", *words).communicate())
    assert "error:" in said and "this run began with" in said and "SIGTERM" in said and "SIGKILL" not in said, said


def test_torchrun_restarts_a_killed_process(images, tmp_path_factory):
    """Both processes start again and go on: killed in another epoch and on two nodes, a run ends with the same weights.
    """
    folders = [torchrun(images, tmp_path_factory.mktemp("logs"), nodes, epochs) for nodes, epochs in ((1, 1), (2, 2))]
    for folder in folders:
        assert [record["epoch"] for record in log(folder)] == list(range(4))
    assert kill_and_resume.same(*map(kill_and_resume.weights, folders))


def children(pid):
    """The processes that one has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
