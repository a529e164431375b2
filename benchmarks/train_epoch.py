"""Training with FFCV from a real file: images/s, the share of time waiting for data, and the CPU cores it would take.

    export PYTHONPATH=train
    python benchmarks/train_epoch.py --images $IMAGENET_DIR/val --workers 4 8 16          on the GPU
    python benchmarks/train_epoch.py --device cpu --arch resnet18 --batch_size 8 --resolution 32 --count 32 --pixels 64

The file (half JPEGs, half raw pixels, as the README's) is made of the image folder, or of made-up pictures. Training
runs on it once for each number of workers: images/s and waiting of the epochs after the first (which warms up), as
median (min–max). Beside them FFCV alone, and DataLoader alone on the image folder; and train_step.py's two steps, the
most that either could reach. Cores to wait less than 5 %: 0.95 * our step's rate / that of one of FFCV's decoding
workers, if decoding grows in proportion to the cores.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from loaders import train_loader
from measure import machine, make_images, seconds, spread
from train_step import add_step_flags, compare, device_and_precision, ours, plain

from mrl_files import InputError, command_line, file_path

TRAIN = Path(__file__).resolve().parent.parent / "train"


def python(*words):
    """Run a script of train/ there, as a user does."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=TRAIN, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"train/{words[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def write_file(images, path, pixels):
    python("write_imagenet.py", "--cfg.dataset=imagenet", "--cfg.split=train", f"--cfg.data_dir={images}",
           f"--cfg.write_path={path}", f"--cfg.max_resolution={pixels}", "--cfg.write_mode=proportion",
           "--cfg.compress_probability=0.5", "--cfg.jpeg_quality=90", f"--cfg.num_workers={os.cpu_count()}")


def train(path, workers, folder, args, log_level=0):
    """-> the log's records of the epochs after the first (which warms up). log_level: 1 validates after each."""
    head = {"MRL": "--model.mrl=1", "MRL-E": "--model.efficient=1", "FF": "--model.mrl=0"}[args.head]
    python("train_imagenet.py", head, f"--model.arch={args.arch}", f"--model.num_classes={args.classes}",
           f"--data.train_dataset={path}", f"--data.val_dataset={path}", f"--data.num_workers={workers}",
           "--data.in_memory=1", f"--resolution.min_res={args.resolution}", f"--resolution.max_res={args.resolution}",
           f"--validation.resolution={args.resolution}", f"--validation.batch_size={args.batch_size}",
           f"--training.batch_size={args.batch_size}", f"--training.epochs={args.epochs}", "--training.use_blurpool=1",
           f"--training.compile={args.compile}", f"--training.precision={args.precision}",
           f"--training.device={args.device.type}", f"--logging.log_level={log_level}", f"--logging.folder={folder}",
           f"--logging.name={workers}")
    log = (folder / str(workers) / "log").read_text(encoding="utf-8")
    return [json.loads(line) for line in log.splitlines()][1:]


def speed_and_waiting(records):
    """-> (images/s, share of time waiting), each [epochs]."""
    return [np.array([record[key] for record in records]) for key in ("images_per_second", "waiting_for_data")]


def decode(path, args):
    """-> {workers: images/s [epochs - 1]} of the loader of an .ffcv file or a folder alone; the first epoch
    compiles."""
    rates = {}
    for workers in args.workers:
        loader = train_loader(path, args.batch_size, workers, 1, args.resolution, 0, "cpu")
        times = [seconds(lambda loader=loader, e=e: list(map(len, loader.epoch(e)))) for e in range(args.epochs)]
        rates[workers] = len(loader) * args.batch_size / np.array(times[1:])
    return rates


def step_rates(args):
    """-> images/s of our step and of the plain recipe's, with the data on the device; they take turns."""
    torch.backends.cudnn.benchmark = True
    return compare(args.resolution, {(side.__name__, args.head): side(args.head, args) for side in (ours, plain)}, args)


def measure(folder, args):
    images = Path(args.images or folder / "images")
    if not args.images:
        make_images(images, args.count, args.pixels)
    args.classes = sum(path.is_dir() for path in images.iterdir())
    path = folder / "train.ffcv"
    write_file(images.resolve(), path, args.pixels)
    print(f"{path.stat().st_size / 1e6:.1f} MB, {args.classes} classes, longest side at most {args.pixels}", flush=True)
    alone, folder_alone = decode(path, args), decode(images.resolve(), args)
    print(f"\n{'workers':>8s}{'training, images/s':>28s}{'waiting, %':>24s}{'FFCV alone, images/s':>28s}"
          f"{'folder alone, images/s':>28s}")
    for workers in args.workers:
        speed, waiting = speed_and_waiting(train(path, workers, folder / "runs", args))
        print(f"{workers:8d}{spread(speed, 4):>28s}{spread(100 * waiting, 4):>24s}{spread(alone[workers], 4):>28s}"
              f"{spread(folder_alone[workers], 4):>28s}",
              flush=True)
    conclude(step_rates(args), alone, args)


def conclude(steps, alone, args):
    step, usual = (np.median(steps[side, args.head]) for side in ("ours", "plain"))
    fewest = min(args.workers)
    per_core = np.median(alone[fewest]) / fewest
    print(f"\n{'data on the device, our step':40s}{spread(steps['ours', args.head], 4):>28s} images/s")
    print(f"{'data on the device, plain step':40s}{spread(steps['plain', args.head], 4):>28s} images/s")
    print(f"decoding, one worker of {fewest}: {per_core:.4g} images/s")
    for name, rate in (("our", step), ("the plain", usual)):
        print(f"cores to wait less than 5 % with {name} step: {math.ceil(0.95 * rate / per_core)}")


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{machine(args.device)}; {args.arch} {args.head}, {args.resolution} px, batch {args.batch_size}, "
              f"{args.precision}, compile {args.compile}")
        measure(Path(folder), args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=file_path, help="one folder per class [default: made-up pictures]")
    parser.add_argument("--count", type=int, default=8192, help="of the made-up pictures")
    parser.add_argument("--pixels", type=int, default=500, help="longest side")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--epochs", type=int, default=3, help="2 or more")
    parser.add_argument("--head", choices=["FF", "MRL", "MRL-E"], default="MRL")
    parser.add_argument("--resolution", type=int, default=160)
    add_step_flags(parser)
    args = parser.parse_args()
    if args.epochs < 2:
        raise InputError("--epochs: the first one warms up; give 2 or more")
    if args.images and not Path(args.images).is_dir():
        raise InputError(f"--images={args.images}: no such folder")
    return device_and_precision(args)


if __name__ == "__main__":
    command_line(main)
