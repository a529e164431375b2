"""The README's training commands, as a user runs them: with the data, device and lengths of a test."""
import json
import os
import re
import sys
import time
from types import SimpleNamespace

import kill_and_resume
import numpy as np
import pytest
import torch
import train_imagenet
from forked import free_port
from torch.utils.data import DistributedSampler

import MRL
import mrl_files
import mrl_models

ORIGINAL = """train_imagenet.py --config-file rn50_configs/rn50_40_epochs.yaml {model}
    --data.train_dataset=$WRITE_DIR/train_500_0.50_90.ffcv --data.val_dataset=$WRITE_DIR/val_500_uncompressed.ffcv
    --data.num_workers=12 --data.in_memory=1 --logging.folder=trainlogs --logging.log_level=1
    --dist.world_size=2 --training.distributed=1 --lr.lr=0.425"""
SMALL = """--training.device=cpu --model.num_classes=3 --training.batch_size=8 --training.epochs=1 --lr.lr=0.01
    --resolution.min_res=32 --resolution.max_res=32 --validation.resolution=32"""
MODELS = {"ff": "--model.fixed_feature=2048", "mrl": "--model.mrl=1", "mrl_e": "--model.efficient=1"}
LEAVES = ["checkpoint.pt", "final_weights.pt", "log", "params.json"]


def command(model, folder, ffcv_folder, *changes):
    text = ORIGINAL.format(model=model).replace("$WRITE_DIR", str(ffcv_folder)).replace("trainlogs", str(folder))
    return " ".join([text, SMALL, f"--dist.port={free_port()}", *changes])


def only_run(folder):
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ffcv_folder, run, run_here):
    """trained("mrl", processes) -> the run folder that the command leaves; each trained once."""
    runs = {}

    def train(kind, processes):
        if (kind, processes) not in runs:
            folder = tmp_path_factory.mktemp(f"{kind}{processes}")
            changes = ["--training.distributed=0"] * (processes == 1) + ["--logging.tensorboard=1"] * (kind == "mrl_e")
            done = (run_here if processes == 1 else run)("train", command(MODELS[kind], folder, ffcv_folder, *changes))
            runs[kind, processes] = done, only_run(folder)
        return runs[kind, processes]
    return train


@pytest.mark.parametrize("kind, processes", [("ff", 1), ("mrl", 2), ("mrl_e", 1)])
def test_the_readmes_commands(trained, kind, processes):
    done, folder = trained(kind, processes)
    assert sorted(p.name for p in folder.iterdir()) == LEAVES + ["tensorboard"] * (kind == "mrl_e")
    model = mrl_models.load_model(folder / "final_weights.pt")
    assert model.spec["head"] == {"ff": "ff2048"}.get(kind, kind)
    (record,) = map(json.loads, (folder / "log").read_text().splitlines())
    sizes = [""] if kind == "ff" else [f"_{d}" for d in MRL.NESTING_LIST]
    for size in sizes:
        assert 0 <= record[f"top_1{size}"] <= record[f"top_5{size}"] == 1
        assert np.isfinite([record[f"val_loss{size}"], record[f"train_loss{size}"]]).all()
    assert record["val_images"] == 34 and record["resolution"] == 32
    assert {"timestamp", "relative_time", "current_lr", "val_time", "train_loss", "epoch", "images_per_second",
            "waiting_for_data", "peak_memory_mb"} <= record.keys()
    assert record["train_loss"] == pytest.approx(sum(record[f"train_loss{size}"] for size in sizes), rel=1e-5)
    assert f"run folder: {folder}" in done.stdout and "Traceback" not in done.stderr
    assert len(re.findall(r"^ +\d+ +\d+\.\d\d +100\.00 ", done.stdout, re.M)) == len(sizes)
    settings = json.loads((folder / "params.json").read_text())["settings"]
    assert settings["dist"]["world_size"] == processes and settings["lr"]["lr"] == 0.01


def test_tensorboard_is_missed_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    settings = SimpleNamespace(training=SimpleNamespace(device="cpu", distributed=0),
                               logging=SimpleNamespace(tensorboard=1), dist=SimpleNamespace(world_size=1))
    with pytest.raises(mrl_files.InputError, match=r"^--logging.tensorboard=1 needs .*: pip install tensorboard$"):
        train_imagenet.check_settings(settings, {})


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [0, 1])
def test_on_a_gpu(compiled, tmp_path, ffcv_folder):
    """fp16, two resolutions; resumed after its first epoch, a run ends where the whole one did, but for rounding.

    A ResNet18: benchmarks/gpu.sh has two minutes for this, and compiling a ResNet50 four times takes more.
    """
    words = command(MODELS["mrl"], tmp_path, ffcv_folder, f"--training.device=cuda --training.compile={compiled}",
                    "--training.distributed=0 --training.epochs=2 --resolution.max_res=64 --model.arch=resnet18",
                    "--logging.name=run").split()
    folder, first = tmp_path / "run", tmp_path / "first.pt"
    process = kill_and_resume.start([sys.executable, *words])
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.link(folder / "checkpoint.pt", first)      # the second epoch's takes its place
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr
    whole = torch.load(folder / "final_weights.pt")
    (folder / "final_weights.pt").unlink()
    first.replace(folder / "checkpoint.pt")
    kill_and_resume.finish([sys.executable, "train_imagenet.py", f"--training.resume={folder}"])
    records = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1] and records[0]["peak_memory_mb"] > 0
    for name, weights in torch.load(folder / "final_weights.pt").items():
        torch.testing.assert_close(weights, whole[name], rtol=0.05, atol=0.05)


def test_two_processes_equal_one_that_accumulates(trained, ffcv_folder):
    """Each half-batch is normalised by its own statistics; the gradients of both are averaged."""
    from loaders import normalise, pixel_statistics, train_loader
    from recipe import make_optimizer
    from schedules import iteration_rates
    _, folder = trained("mrl", 2)
    s = json.loads((folder / "params.json").read_text(), object_hook=lambda d: type("S", (), d))
    torch.manual_seed(0)
    model = mrl_models.build_model("resnet50", "mrl", num_classes=3).to(memory_format=torch.channels_last)
    optimizer, criterion = make_optimizer(model, s.settings.training), MRL.Matryoshka_CE_Loss(label_smoothing=0.1)
    halves = []
    for half in ordered_halves(60):
        loader = train_loader(ffcv_folder / "train_500_0.50_90.ffcv", 8, 1, 1, 32, 0, "cpu")
        loader.next_traversal_order = lambda half=half: half[:24]
        halves.append([(x.clone(), y.clone()) for x, y in loader.epoch(0)])
    steps, pixels = list(zip(*halves, strict=True)), pixel_statistics("cpu", mrl_models.MEAN, mrl_models.STD)
    assert len(steps) == 3
    for rate, batches in zip(iteration_rates(0, 3, s.settings.lr, 1), steps, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        for rank, (images, labels) in enumerate(batches):
            statistics = [b.clone() for b in model.buffers()]
            loss = criterion(model(normalise(images, *pixels)), labels.flatten())
            (loss / 2).backward()
            if rank:      # only the first process's running statistics are kept
                for buffer, before in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(before)
        optimizer.step()
    final = mrl_models.load_model(folder / "final_weights.pt").state_dict()
    for name, value in model.state_dict().items():
        scale = value.abs().max().clamp(min=1e-3) if value.is_floating_point() else 1
        assert ((final[name] - value).abs() / scale).max() < 2e-3, name


def ordered_halves(images):
    """The order of the two processes, as PyTorch's sampler gives it to FFCV."""
    for rank in range(2):
        sampler = DistributedSampler(range(images), num_replicas=2, rank=rank, shuffle=True, seed=0)
        sampler.set_epoch(0)
        yield np.array(list(sampler))


def test_weights_can_be_validated_alone(trained, ffcv_folder, run_here, tmp_path):
    _, folder = trained("mrl", 2)
    done = run_here("train", command(MODELS["mrl"], tmp_path, ffcv_folder, "--training.distributed=0",
                                     f"--training.eval_only=1 --training.path={folder}/final_weights.pt"))
    (record,) = map(json.loads, (folder / "log").read_text().splitlines())
    first, *_, last = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    for (size, top_1, top_5, loss), expected in ((first, 8), (last, 2048)):
        assert int(size) == expected
        assert (top_1, top_5) == tuple(f"{100 * record[f'{key}_{size}']:.2f}" for key in ("top_1", "top_5"))
        assert loss == f"{record[f'val_loss_{size}']:.4f}"


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/tmp", "..", "."])
def test_a_runs_name_does_not_lead_out_of_its_folder(tmp_path, name):
    settings = SimpleNamespace(logging=SimpleNamespace(folder=str(tmp_path), name=name))
    with pytest.raises(mrl_files.InputError, match=r"--logging\.name=.*--logging\.folder"):
        train_imagenet.run_folder(settings)
    settings.logging.name = "..a run"
    assert train_imagenet.run_folder(settings) == tmp_path / "..a run"


def test_one_bad_command_ends_in_one_line(refused, ffcv_folder, tmp_path):
    line = refused("train", command("--model.mrl=1 --model.fixed_feature=64", tmp_path, ffcv_folder))
    assert line.startswith("error: --model.fixed_feature=64") and not list(tmp_path.iterdir())
