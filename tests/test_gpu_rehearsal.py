"""The commands on two GPUs, for which the CPU stands in (stand_in_gpus/): training, inference, retrieval.

FFCV and PyTorch take the branches that they take on a GPU, and so does the code: `test_every_gpu_line_was_run` finds
the lines that run only there (`pytest -rP` lists them). What a real GPU alone can show is in `pytest -m gpu`.

FFCV compiles for seconds in every process, so there are few: one for all that one process does, two spawned ones that
are stopped, and two of torchrun's that go on with their run and then write embeddings.
"""
import json
import re
import signal
import subprocess
import sys
import time

import gpu_lines
import kill_and_resume
import numpy as np
import pytest
import torch
from conftest import ROOT, with_python
from forked import free_port

from MRL import truncate

FOLDERS = ("train", "inference", "retrieval", "model_analysis")
FILES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in sorted((ROOT / name).glob("*.py")))]
STAND_INS = ROOT / "tests/stand_in_gpus"
SETTINGS = ("--training.device=cuda --model.arch=shufflenet_v2_x0_5 --training.epochs=2 --resolution.max_res=64 "
            "--resolution.end_ramp=1 --logging.log_level=1 --training.label_smoothing=0.1").split()
HEADS = {"ff": ["--model.mrl=0", "--model.fixed_feature=16"], "mrl": [],
         "mrl_e": ["--model.mrl=0", "--model.efficient=1"]}
# Lines that run only with a GPU, and not here.
LEFT_OUT = {
    r"launch.py:\d+: raise InputError\(.*(sees no GPU|this machine shows)": "fewer GPUs than asked for: test_launch.py",
    r"neighbors.py:\d+: raise InputError\('device cuda was asked for": "no GPU: test_neighbors.py",
}


class Rehearsal:
    """The files of the runs, and how a command starts on two GPUs. notes/<run>: what its processes did with them."""

    def __init__(self, folder, noise):
        self.folder, self.runs, self.notes, self.lines = (folder / name for name in ("", "runs", "notes", "lines"))
        self.notes.mkdir()
        self.lines.touch()
        self.ffcv = noise / "data.ffcv"
        for split in ("train", "val"):
            (folder / "sets").mkdir(exist_ok=True)
            (folder / "sets" / split).symlink_to(noise / "images")
        self.env = with_python(
            STAND_IN_GPUS="2", STAND_IN_NOTES=str(self.notes / "started"), LINES_RUN=str(self.lines),
            WATCHED_FILES=json.dumps(list(map(str, FILES))),
            PYTHONPATH=":".join(map(str, (STAND_INS, ROOT, ROOT / "tests", *(ROOT / name for name in FOLDERS)))))

    def start(self, run, *words):
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=self.folder, text=True,
                                env={**self.env, "STAND_IN_NOTES": str(self.notes / run)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def in_turn(self, commands, *launcher):
        """Several commands in one process, or in each of torchrun's: {run: ("module.function", words)}."""
        listed = [(self.notes / run, function, words) for run, (function, words) in commands.items()]
        process = self.start("started", *launcher, STAND_INS / "in_turn.py", json.dumps(listed, default=str))
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-6000:]

    def train(self, run, *changes):
        words = kill_and_resume.command(self.ffcv, self.runs, run, *SETTINGS, *changes)[2:]
        return "train_imagenet.main", words

    def infer(self, *changes):
        return "pytorch_inference.main", ["--path", self.runs / "mrl/final_weights.pt", "--data_root",
                                          self.folder / "sets", "--resize", 36, "--crop", 32, "--batch_size", 8,
                                          "--workers", 1, *changes]

    def compare(self, command, *changes):
        return "baselines.main", [command, "--arrays", self.folder / "arrays", "--model", "mrl1_e0_ff1024",
                                  "--device", "cuda", *changes]

    def search(self, output, device):
        return "retrieve.main", ["search", "--embeddings", self.folder / "arrays", "--output", self.folder / output,
                                 "--device", device, "--sizes", 8, "--k", 5]

    def log(self, run):
        return [json.loads(line) for line in (self.runs / run / "log").read_text().splitlines()]

    def noted(self, run, pattern):
        """-> every different line of a run's notes that the pattern fits."""
        return {line for line in (self.notes / run).read_text().splitlines() if re.fullmatch(pattern, line)}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, noise):
    return Rehearsal(tmp_path_factory.mktemp("rehearsal"), noise(24))


@pytest.fixture(scope="module")
def alone(rehearsal):
    """What one process does: training on the first of two GPUs, inference on the second."""
    r, weights = rehearsal, f"{rehearsal.runs}/mrl/final_weights.pt"
    r.in_turn({
        **{run: r.train(run, *head) for run, head in HEADS.items()},
        "folder": r.train("folder", *(f"--data.{split}_dataset={r.folder}/sets/val" for split in ("train", "val"))),
        "compiled": r.train("compiled", "--training.compile=1", "--training.epochs=1", "--model.arch=resnet18"),
        "recipe": r.train("recipe", *kill_and_resume.RECIPE),
        "validated": r.train("validated", "--training.eval_only=1", f"--training.path={weights}"),
        "classified": r.infer("--tta", "--save_logits", "--save_softmax", "--save_predictions", "--save_gt",
                              "--device", "cuda:1", "--output", r.folder / "outputs"),
        "embedded": r.infer("--retrieval", "--device", "cuda:1", "--retrieval_array_path", r.folder / "arrays"),
        "lp": r.compare("lp", "--epochs", 1),
        "searched": r.search("lists_cpu", "cpu"), "searched on a GPU": r.search("lists_cuda", "auto")})


@pytest.fixture(scope="module")
def spawned(rehearsal):
    """Two processes stopped by SIGTERM after their first epoch -> exit status, standard error. They read folders."""
    data = [f"--data.{split}_dataset={rehearsal.folder}/sets/val" for split in ("train", "val")]
    _, words = rehearsal.train("two", *HEADS["mrl_e"], *kill_and_resume.RECIPE, *data, "--training.distributed=1",
                               "--dist.world_size=2", "--training.batch_size=4", f"--dist.port={free_port()}",
                               "--training.epochs=3")
    process = rehearsal.start("spawned", ROOT / "train/train_imagenet.py", *words)
    while process.poll() is None and not (rehearsal.runs / "two/checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process, process.communicate(timeout=120)[1]


@pytest.fixture(scope="module")
def torchruns(rehearsal, alone, spawned):
    """torchrun's two processes go on with that run, on .ffcv files, then share an embedding dump, and a search."""
    resumed = [f"--training.resume={rehearsal.runs}/two",
               *(f"--data.{split}_dataset={rehearsal.ffcv}" for split in ("train", "val"))]
    rehearsal.in_turn({"resumed": ("train_imagenet.main", resumed),
                       "shared": rehearsal.infer("--retrieval", "--retrieval_array_path", rehearsal.folder / "shared"),
                       "searched together": rehearsal.search("lists_together", "auto")},
                      "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")


# ---- training

@pytest.mark.parametrize("run", [*HEADS, "folder"])
def test_training(rehearsal, alone, run):
    """Two epochs at two resolutions, validated after each; fp16 with its scaler; weights that a CPU reads."""
    assert [(record["resolution"], record["val_images"], record["peak_memory_mb"]) for record in rehearsal.log(run)] \
        == [(32, 24, 123), (64, 24, 123)]
    assert all(np.isfinite(record["train_loss"]) for record in rehearsal.log(run))
    assert {value.device.type for value in torch.load(rehearsal.runs / run / "final_weights.pt").values()} == {"cpu"}
    assert rehearsal.noted(run, ".* (autocast|.*step|graph).*") \
        == {"rank0 _MainThread autocast torch.float16", "rank0 _MainThread scaled step"}


def test_a_recipe(rehearsal, alone):
    """AdamW in one kernel, clipping what the scaler has scaled; an average, validated and saved."""
    assert "rank0 _MainThread scaled step" in rehearsal.noted("recipe", ".*step")
    losses = [[record["train_loss"], record["ema_val_loss_8"]] for record in rehearsal.log("recipe")]
    assert np.isfinite(losses).all() and len(losses) == 2
    state = torch.load(rehearsal.runs / "recipe/checkpoint.pt")
    assert state["ema"]["n_averaged"] == 4 and state["optimizer"]["param_groups"][0]["fused"]
    average, last = (torch.load(rehearsal.runs / f"recipe/final_weights{end}.pt") for end in ("_ema", ""))
    assert average.keys() == last.keys() and not torch.equal(average["conv1.0.weight"], last["conv1.0.weight"])


def test_compiled(rehearsal, alone):
    """A graph for training, one for validation. (That they compute the same: test_trainer.py.)"""
    assert (rehearsal.notes / "compiled").read_text().count("rank0 _MainThread graph\n") == 2
    (record,) = rehearsal.log("compiled")
    assert record["val_images"] == 24 and np.isfinite(record["train_loss"])


def test_eval_only(rehearsal, alone):
    """The figures of the run's own last validation."""
    (again,), (_, last) = rehearsal.log("validated"), rehearsal.log("mrl")
    assert {key: again[key] for key in last if key.startswith(("top_", "val_loss"))} \
        == {key: last[key] for key in last if key.startswith(("top_", "val_loss"))}


def test_two_spawned_processes_stop(rehearsal, spawned):
    process, err = spawned
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"--training.resume={rehearsal.runs}/two" in err and "Traceback" not in err and "Terminating" not in err
    assert rehearsal.noted("spawned", "rank. _MainThread (data parallel|group|scaled).*") == {
        f"rank{rank} _MainThread {what}" for rank in (0, 1)
        for what in (f"data parallel {rank}", "group cpu:gloo,cuda:nccl", "scaled step")}


def test_torchruns_processes_go_on(rehearsal, torchruns):
    assert [record["val_images"] for record in rehearsal.log("two")] == [24, 24, 24]
    assert rehearsal.noted("resumed", "rank. _MainThread (data parallel|group|random).*") == {
        f"rank{rank} _MainThread {what}" for rank in (0, 1)
        for what in (f"data parallel {rank}", "group cpu:gloo,cuda:nccl", "random state restored")}


# ---- inference and retrieval

def test_classification(rehearsal, alone):
    out = rehearsal.folder / "outputs"
    (logits,), (gt,) = ([torch.load(path) for path in out.glob(f"*{what}*.pth")] for what in ("logits", "gt_"))
    (figures,) = map(json.loads, (path.read_text() for path in out.glob("*accuracy*.json")))
    assert logits.dtype == torch.float32 and logits.shape[1:] == (24, 2)
    assert figures["top1"] == pytest.approx((logits.argmax(-1) == gt).float().mean(1).tolist())


def test_embeddings_of_one_process_and_of_torchruns_two(rehearsal, torchruns):
    for name in ("1K_train", "1K_val"):
        one, two = (np.load(next(rehearsal.folder.glob(f"{folder}/{name}*-X.npy"))) for folder in ("arrays", "shared"))
        np.testing.assert_allclose(one, two, rtol=0.02, atol=0.02)
    assert "rank0 _MainThread autocast torch.float16" in rehearsal.noted("embedded", ".*")


def test_search_on_a_device(rehearsal, torchruns):
    """The GPU's branch finds neighbours as near as the CPU's does, in one process or in two (which of those that are
    equally far is anyone's choice, and this network's embeddings are nearly the same)."""
    xb, xq = (truncate(torch.from_numpy(np.load(next(rehearsal.folder.glob(f"arrays/1K_{split}_*-X.npy")))).double(), 8)
              for split in ("train", "val"))
    cpu, gpu, two = (np.load(next((rehearsal.folder / f"lists_{device}").rglob("*.npy"))).astype(int)
                     for device in ("cpu", "cuda", "together"))
    nearest = [(xq[:, None] - xb[torch.from_numpy(I)]).square().sum(-1) for I in (cpu, gpu, two)]
    assert all(len(set(row)) == 5 for row in (*gpu, *two))
    torch.testing.assert_close(nearest[1:], nearest[:1] * 2, rtol=0, atol=5e-6)


# ---- which GPU

@pytest.mark.parametrize("run, gpus, thread", [
    ("mrl", {0: 0}, "EpochIterator"), ("spawned", {0: 0, 1: 1}, "Thread"),
    ("resumed", {0: 0, 1: 1}, "EpochIterator"), ("folder", {0: 0}, "Thread"), ("shared", {0: 0, 1: 1}, "Thread"),
    ("classified", {0: 1}, "Thread"), ("embedded", {0: 1}, "Thread")])
def test_each_process_uses_its_own_gpu(rehearsal, alone, spawned, torchruns, run, gpus, thread):
    """In the thread of FFCV and in that which pins batches too: either begins on GPU 0. gpus: {rank: its GPU}."""
    assert rehearsal.noted(run, ".* uses .*") == {
        f"rank{rank} {kind} uses {gpu}" for rank, gpu in gpus.items() for kind in ("_MainThread", thread)}


# ---- lines that run only with a GPU

def test_every_gpu_line_was_run(rehearsal, alone, spawned, torchruns):
    run, missed = set(rehearsal.lines.read_text().splitlines()), []
    for path in FILES:
        for (first, _), text in gpu_lines.gpu_statements(path.read_text()).items():
            ran = f"{path}:{first}" in run
            missed += [] if ran else [f"{path.name}:{first}: {text}"]
            print("run " if ran else "MISSED", f"{path.relative_to(ROOT)}:{first}: {text[:90]}")
    unexplained = [line for line in missed if not any(re.match(pattern, line) for pattern in LEFT_OUT)]
    assert not unexplained
    assert all(any(re.match(pattern, line) for line in missed) for pattern in LEFT_OUT), "explained, but run"


def test_what_a_gpu_line_is():
    source = """
def common(device, k):
    '''no cuda here'''
    first = 1
    if device == "cpu":
        return "cpu"
    if k and gpus():
        second = 2
    return third
def more(self):
    half = "fp16" if self.device.type == "cuda" else "fp32"
    if not self.cuda:
        host = 1
    else:
        fourth = 4
    if precision and device == "cpu":
        raise ValueError
    if device.type != "cpu":
        fifth = (5,
                 6)
    return first
def on_gpu():
    sixth = 6
"""
    assert gpu_lines.gpu_statements(source) == {
        (5, 5): "device == 'cpu'", (7, 7): "k and gpus()", (8, 8): "second = 2", (9, 9): "return third",
        (11, 11): "half = 'fp16' if self.device.type == 'cuda' else 'fp32'", (12, 12): "not self.cuda",
        (15, 15): "fourth = 4", (16, 16): "precision and device == 'cpu'", (18, 18): "device.type != 'cpu'",
        (19, 20): "fifth = (5, 6)", (23, 23): "sixth = 6"}
