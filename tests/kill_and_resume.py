"""Kill training with SIGKILL at random moments, resume it, and compare with the run that nobody killed.

    python tests/kill_and_resume.py --runs 20      about 15 minutes on 2 cores
    python tests/kill_and_resume.py --recipe       with all that a run may hold: AdamW, an average, mixing, accumulation

Prints a line a run; exit status 1 if any differs. tests/test_resume.py kills one run.
"""
import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TRAIN = Path(__file__).resolve().parent.parent / "train"
# Short epochs and a model of 45 MB: a good part of the time goes into saving checkpoints, so that kills hit saves too.
SETTINGS = ("--model.arch=resnet18 --model.mrl=1 --model.num_classes=2 --resolution.min_res=32 --resolution.max_res=32 "
            "--validation.resolution=32 --training.epochs=8 --training.batch_size=8 --training.device=cpu --lr.lr=0.01 "
            "--data.num_workers=1 --data.in_memory=1 --logging.log_level=0").split()

RECIPE = ("--training.optimizer=adamw --training.ema=0.9 --training.mixup=0.2 --training.cutmix=1 "
          "--training.accumulate=2 --training.clip_grad_norm=1 --lr.lr=0.001 --lr.lr_schedule_type=cosine "
          "--lr.warmup_epochs=1").split()


def command(images, logs, name, *changes):
    data = [f"--data.train_dataset={images}", f"--data.val_dataset={images}", f"--logging.folder={logs}"]
    return [sys.executable, "train_imagenet.py", *data, f"--logging.name={name}", *SETTINGS, *changes]


def start(words):
    return subprocess.Popen(words, cwd=TRAIN, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(words):
    done = subprocess.run(words, cwd=TRAIN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def make_images(folder, n=24):
    """Class folders of n pictures."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / "images" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return folder / "images"


def writer(folder):
    """-> write_imagenet.py and its words: folder/images becomes folder/data.ffcv."""
    return ["write_imagenet.py", "--cfg.split=train", "--cfg.max_resolution=40", "--cfg.num_workers=1",
            f"--cfg.data_dir={folder}/images", f"--cfg.write_path={folder}/data.ffcv", "--cfg.write_mode=raw"]


def kill_at_random(words, folder, rng):
    """Start a run, kill it between two of its saves or in one -> what it was doing: saving, training, or finished."""
    process, saves = start(words), [(None, time.monotonic())]
    wanted = rng.randrange(1, 8)
    while process.poll() is None and len(saves) <= wanted:
        if (stamp := written(folder / "checkpoint.pt")) != saves[-1][0]:
            saves.append((stamp, time.monotonic()))
        time.sleep(0.002)
    between = saves[-1][1] - saves[-2][1] if len(saves) > 2 else 0.5
    time.sleep(rng.uniform(0, between))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (folder / "final_weights.pt").exists():
        return "finished"
    return "saving" if list(folder.glob(".checkpoint*.pt")) else "training"


def written(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def weights(folder):
    """-> {(file, key): tensor} of final_weights.pt, and of the average's where there is one."""
    return {(path.name, key): value for path in folder.glob("final_weights*.pt")
            for key, value in torch.load(path, weights_only=True).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def main(runs, seed=0, kills=2, changes=()):
    """-> number of runs, each killed up to `kills` times, whose weights differ from those of the run left alone.

    changes: more flags of train_imagenet.py.
    """
    rng, differing = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        logs, ffcv = Path(name), Path(name, "data.ffcv")
        make_images(logs)
        finish([sys.executable, *writer(logs)])
        finish(command(ffcv, logs, "uninterrupted", *changes))
        expected = weights(logs / "uninterrupted")
        for run in range(runs):
            folder = logs / f"run{run}"
            moments = []
            while not moments or (moments[-1] != "finished" and len(moments) < kills):
                moments.append(kill_at_random(command(ffcv, logs, folder.name, *changes), folder, rng))
            if moments[-1] != "finished":
                finish([sys.executable, "train_imagenet.py", f"--training.resume={folder}"])
            equal = same(weights(folder), expected)
            differing += not equal
            print(f"run {run + 1}/{runs}: killed while {', then '.join(moments)}: {'equal' if equal else 'DIFFERENT'}",
                  flush=True)
    return differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", action="store_true", help=" ".join(RECIPE))
    args = parser.parse_args()
    sys.exit(1 if main(args.runs, args.seed, changes=RECIPE if args.recipe else ()) else 0)
