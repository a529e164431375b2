"""The commands on two GPUs, for which the CPU stands in (stand_in_gpus/): training, inference, retrieval.

FFCV and PyTorch take the branches that they take on a GPU, and so does the code: `test_every_gpu_line_was_run` finds
the lines that run only there. What a real GPU alone can show is in `pytest -m gpu`.
"""
import ast
import json
import re
import signal
import subprocess
import sys
import time

import coverage
import kill_and_resume
import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, with_python

FOLDERS = ("train", "inference", "retrieval")
SETTINGS = ("--training.device=cuda --training.epochs=2 --resolution.max_res=64 --resolution.end_ramp=1 "
            "--logging.log_level=1 --training.label_smoothing=0.1").split()
HEADS = {"ff": ["--model.mrl=0", "--model.fixed_feature=16"], "mrl": [],
         "mrl_e": ["--model.mrl=0", "--model.efficient=1"]}
IN_TURN = """
import json, sys, {module}
for words in json.loads(sys.argv[1]):
    sys.argv = words
    {module}.main()
"""
# Lines that run only with a GPU, and not here.
LEFT_OUT = {
    r"faiss\.knn_gpu|faiss\.StandardGpuResources": "FAISS built for GPUs: the wheel is not",
    r"^raise InputError": "errors of machines without the GPUs asked for: tests of their own, as they need none",
}


class Rehearsal:
    """The files of the runs, and how a command starts on two GPUs."""

    def __init__(self, folder):
        self.folder, self.lines, self.notes = folder, folder / "lines", folder / "notes"
        (folder / "coverage.ini").write_text(
            f"[run]\ndata_file = {self.lines}/of\nparallel = True\nsigterm = True\ninclude =\n    {ROOT}/mrl_*.py\n"
            + "".join(f"    {ROOT / name}/*.py\n" for name in FOLDERS))
        self.lines.mkdir()
        self.ffcv = kill_and_resume.make_data(folder)
        self.env = with_python(STAND_IN_GPUS="2", STAND_IN_LOG=str(self.notes), PYTHONWARNINGS="default",
                               PYTHONPATH=str(ROOT / "tests/stand_in_gpus"),
                               COVERAGE_PROCESS_START=str(folder / "coverage.ini"))

    def start(self, where, *words):
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT / where, env=self.env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, where, *words):
        process = self.start(where, *words)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-4000:]
        assert "Traceback" not in err, err[-4000:]
        return out, err

    def in_turn(self, where, module, commands):
        """Several commands in one process, by the script's own main."""
        commands = [[f"{module}.py", *map(str, words)] for words in commands]
        return self.run(where, "-c", IN_TURN.format(module=module), json.dumps(commands))

    def train(self, name, *changes):
        """-> the words of a training command, without Python and the script."""
        return kill_and_resume.command(self.ffcv, self.folder / "runs", name, *SETTINGS, *changes)[2:]

    def noted(self, pattern):
        return set(re.findall(pattern, self.notes.read_text()))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    return Rehearsal(tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture(scope="module")
def trained(rehearsal):
    """FF, MRL, MRL-E, compiled, and eval_only, in one process on one GPU."""
    weights = rehearsal.folder / "runs/mrl/final_weights.pt"
    return rehearsal.in_turn("train", "train_imagenet", [
        *(rehearsal.train(name, *head) for name, head in HEADS.items()),
        rehearsal.train("compiled", "--training.compile=1"),
        rehearsal.train("alone", "--training.eval_only=1", f"--training.path={weights}")])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize("name", [*HEADS, "compiled"])
def test_training(rehearsal, trained, name):
    """Two epochs at two resolutions, validated after each; fp16 with its scaler; weights that a CPU reads."""
    folder = rehearsal.folder / "runs" / name
    records = log_of(folder)
    assert [(record["resolution"], record["val_images"], record["peak_memory_mb"]) for record in records] \
        == [(32, 24, 123), (64, 24, 123)]
    assert all(np.isfinite(record["train_loss"]) for record in records)
    assert {value.device.type for value in torch.load(folder / "final_weights.pt").values()} == {"cpu"}
    assert "scaler True" in rehearsal.noted(r"scaler \w+")


def test_eval_only(rehearsal, trained):
    """The figures of the run's own last validation."""
    (alone,), (_, last) = (log_of(rehearsal.folder / "runs" / name) for name in ("alone", "mrl"))
    assert alone["top_1_8"] == last["top_1_8"] and alone["val_loss_512"] == last["val_loss_512"]


def test_two_spawned_processes_stopped_and_resumed(rehearsal):
    words = rehearsal.train("spawned", "--training.distributed=1", "--dist.world_size=2", "--training.batch_size=4",
                            f"--dist.port={free_port()}", "--training.epochs=3")
    process, folder = rehearsal.start("train", "train_imagenet.py", *words), rehearsal.folder / "runs/spawned"
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"--training.resume={folder}" in err and "Traceback" not in err and "Terminating" not in err
    rehearsal.run("train", "train_imagenet.py", f"--training.resume={folder}")
    assert [record["val_images"] for record in log_of(folder)] == [24, 24, 24]
    assert rehearsal.noted("random state restored") and rehearsal.noted(r"rank\d data parallel \d") == {
        "rank0 data parallel 0", "rank1 data parallel 1"}


def test_two_processes_of_torchrun(rehearsal):
    words = rehearsal.train("torchrun", *HEADS["mrl_e"], "--training.batch_size=4")
    rehearsal.run("train", "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
                  "train_imagenet.py", *words)
    assert [record["val_images"] for record in log_of(rehearsal.folder / "runs/torchrun")] == [24, 24]
    assert "group cpu:gloo,cuda:nccl" in rehearsal.noted("group .*")


def inference(rehearsal, folder, *changes):
    return ["--path", rehearsal.folder / "runs/mrl/final_weights.pt", "--data_root", rehearsal.folder / "sets",
            "--resize", 36, "--crop", 32, "--batch_size", 8, "--workers", 1, *changes,
            "--retrieval_array_path" if "--retrieval" in changes else "--output", folder]


@pytest.fixture(scope="module")
def evaluated(rehearsal, trained):
    """Classification and embeddings, in one process on the second of two GPUs."""
    (rehearsal.folder / "sets").mkdir()
    for split in ("train", "val"):
        (rehearsal.folder / "sets" / split).symlink_to(rehearsal.folder / "images")
    rehearsal.in_turn("inference", "pytorch_inference", [
        inference(rehearsal, rehearsal.folder / "out", "--tta", "--save_softmax", "--save_logits", "--save_gt",
                  "--save_predictions", "--device", "cuda:1", "--precision", "fp16"),
        inference(rehearsal, rehearsal.folder / "arrays", "--retrieval", "--device", "cuda:1")])


def test_classification(rehearsal, evaluated):
    out = rehearsal.folder / "out"
    (logits,), (gt,) = ([torch.load(path) for path in out.glob(f"*{what}*.pth")] for what in ("logits", "gt_"))
    (figures,) = map(json.loads, (path.read_text() for path in out.glob("*accuracy*.json")))
    assert logits.dtype == torch.float32 and logits.shape[1:] == (24, 2)
    assert figures["top1"] == pytest.approx((logits.argmax(-1) == gt).float().mean(1).tolist())


def test_embeddings_of_one_process_and_of_torchruns_two(rehearsal, evaluated):
    words = inference(rehearsal, rehearsal.folder / "arrays2", "--retrieval")
    rehearsal.run("inference", "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
                  "pytorch_inference.py", *words)
    for name in ("1K_train", "1K_val"):
        one, two = (np.load(next(rehearsal.folder.glob(f"{folder}/{name}*-X.npy"))) for folder in ("arrays", "arrays2"))
        np.testing.assert_allclose(one, two, rtol=0.02, atol=0.02)


def test_search_on_a_device(rehearsal, evaluated):
    """The lists of the GPU's branch are those of the CPU's."""
    lists = []
    for device in ("cuda", "cpu"):
        out = rehearsal.folder / f"search_{device}"
        rehearsal.run("retrieval", "retrieve.py", "search", "--embeddings", rehearsal.folder / "arrays",
                      "--output", out, "--device", device, "--sizes", 8, "--k", 5)
        lists.append(np.load(next(out.rglob("*.npy"))))
    assert [set(row) for row in lists[0]] == [set(row) for row in lists[1]]


def test_no_process_touches_anothers_gpu(rehearsal, evaluated):
    """The second process of two never takes memory on the first one's GPU, in any of its threads."""
    assert not rehearsal.noted(r"rank1 (?:uses|stream|set_device) 0")
    assert rehearsal.noted(r"rank1 (?:uses|stream|set_device) 1")


# ---- lines that run only with a GPU

def gpu_lines(path):
    """-> {first line: text} of the statements that a machine without a GPU never runs: bodies of `if cuda`, and calls
    into torch.cuda but for its questions."""
    source, found = path.read_text(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and re.search(r"cuda|gpu", ast.unparse(node.test), re.I) \
                and not re.match(r"not ", ast.unparse(node.test)):
            found |= {line.lineno: ast.unparse(line) for line in node.body}
        if isinstance(node, ast.Expr | ast.Assign | ast.Return) \
                and re.search(r"torch\.cuda\.(?!is_available|device_count|current_device)|faiss\.\w*(gpu|Gpu)\w*\(",
                              ast.unparse(node)):
            found[node.lineno] = ast.unparse(node)
    return found


def test_every_gpu_line_was_run(rehearsal, evaluated):
    data = coverage.CoverageData(f"{rehearsal.lines}/all")
    for part in rehearsal.lines.glob("of.*"):
        one = coverage.CoverageData(str(part))
        one.read()
        data.update(one)
    paths = [*ROOT.glob("mrl_*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]
    missed, seen = [], 0
    for path in paths:
        run = set(data.lines(str(path)) or ())
        for number, text in gpu_lines(path).items():
            seen += 1
            if number not in run and not any(re.search(pattern, text) for pattern in LEFT_OUT):
                missed.append(f"{path.relative_to(ROOT)}:{number}: {text}")
    assert not missed and seen >= 15, missed
