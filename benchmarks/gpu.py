"""The GPU tests (a run is resumed among them), then one table: training, validation, embeddings, search.

    PYTHONPATH=train:inference:retrieval python benchmarks/gpu.py
    PYTHONPATH=train:inference:retrieval python benchmarks/gpu.py --tiny --device cpu        each part, in seconds

Each part runs in a process of its own and has a share of --minutes; what it leaves goes to the parts after it. One that
fails, is stopped, or finds no time left is named in its place, and the others go on; the exit status is then 1. Rows
(what, figure as median (min–max), ratio, aim) are printed and kept in --output as they come. gpu.sh starts this.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import machine, make_images, seconds, spread

from mrl_files import command_line, file_path, find_device, write_json

ROOT = Path(__file__).resolve().parent.parent
WRONG = "FAILED", "STOPPED", "NOT RUN"      # how the figure of a part begins that has none
LEAST = 3      # seconds: less is not enough to start Python and PyTorch
STEP_AIM, HEAD_AIM = "1.4 or more", "1.01 or less"


def show(what, figure, ratio="", aim=""):
    """A row for the table: printed here, read by the process that started this one."""
    print("row " + json.dumps([what, figure, ratio, aim]), flush=True)


def memory(device, held=0):
    """-> the most that PyTorch had on the GPU since the last reset, less what was `held` (bytes) by others."""
    on_gpu = torch.device(device).type == "cuda"
    return f"{(torch.cuda.max_memory_allocated() - held) / 2 ** 30:.1f} GiB" if on_gpu else "no GPU"


# ------------------------------------------------------------------------------------------------ parts

def tests(sizes):
    """pytest -m gpu; what it prints goes to stderr. A context on a GPU that is not the process's own is an error."""
    words = [sys.executable, "-m", "pytest", "-vv", "-m", "gpu", "--continue-on-collection-errors", ROOT / "tests"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "TORCH_CUDA_CHECK_STRAY_CONTEXT": "error"})
    last = ""
    for last in process.stdout:
        print(last, end="", file=sys.stderr, flush=True)
    show("GPU tests", last.strip(" =\n"), "", "all pass")
    sys.exit(process.wait())


def steps(sizes, compiled):
    """A training step with its data on the device, against the usual recipe (eager fp16, channels-last)."""
    import train_step
    args = sizes.step | {"compile": compiled}
    args = train_step.device_and_precision(SimpleNamespace(**args))
    torch.backends.cudnn.benchmark = True
    works = {(side.__name__, kind): side(kind, args) for kind in train_step.HEADS
             for side in (train_step.ours, train_step.plain)}
    for pixels in sizes.pixels:
        speeds = train_step.compare(pixels, works, args)
        label = f"step, {pixels} px, compile={compiled}"
        for kind in train_step.HEADS:
            mine, usual = speeds["ours", kind], speeds["plain", kind]
            show(f"{label}: {kind}", f"{spread(mine, 4)} images/s", f"{spread(mine / usual)} x usual", STEP_AIM)
        show(f"{label}: MRL's time", "", f"{spread(speeds['ours', 'FF'] / speeds['ours', 'MRL'], 4)} x FF's", HEAD_AIM)
        peaks = [f"{kind} {peak_memory(works['ours', kind], pixels, args)}" for kind in train_step.HEADS]
        show(f"{label}: peak memory of a step, without weights", ", ".join(peaks))


def peak_memory(step, pixels, args):
    """-> what a step takes beside what all six models hold between steps: weights, momenta, gradients."""
    images = torch.zeros(args.batch_size, pixels, pixels, 3, dtype=torch.uint8, device=args.device)
    labels, held = torch.zeros(args.batch_size, dtype=torch.int64, device=args.device), 0
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    step(images, labels)
    return memory(args.device, held)


def epochs(sizes):
    """Training fed by FFCV from a file of JPEGs and raw pixels, and its validation."""
    import train_epoch
    args = train_epoch.device_and_precision(SimpleNamespace(**sizes.epoch))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_images(folder / "images", args.count, args.pixels)
        train_epoch.write_file(folder / "images", folder / "train.ffcv", args.pixels)
        records = train_epoch.train(folder / "train.ffcv", args.workers, folder / "runs", args, log_level=1)
        speed, waiting = train_epoch.speed_and_waiting(records)
        show(f"epochs of {args.count} images from FFCV, {args.workers} workers", f"{spread(speed, 4)} images/s",
             f"{spread(100 * waiting)} % waiting", "less than 5 %")
        show("validation, each image and its mirror image",
             f"{spread(np.array([r['val_images'] / r['val_time'] for r in records]), 4)} images/s")
        show("peak memory of training and validation", f"{records[-1]['peak_memory_mb'] / 1024:.1f} GiB")


def dump(sizes):
    """The embeddings that retrieval reads, from image files, in half precision."""
    import embeddings
    from image_set import ImageSet, Preparation

    from mrl_models import build_model
    args, device, precision = SimpleNamespace(**sizes.epoch), torch.device(sizes.device), "fp16"
    if device.type == "cpu":
        precision = "fp32"
    model = embeddings.remove_head(build_model(args.arch, "mrl", num_classes=10).eval()).to(device)
    about = embeddings.describe_dump({"nesting_list": [sizes.width]}, precision)
    with tempfile.TemporaryDirectory() as folder:
        make_images(folder, args.count, args.pixels)
        images = ImageSet(folder, sorted(os.listdir(folder)), None, Preparation(*sizes.preparation))
        times = [seconds(lambda i=i: embeddings.dump(
            model, images, f"{folder}/{i}", about, device, batch_size=min(256, args.batch_size), workers=args.workers))
            for i in range(4)]
    show(f"embeddings of {args.count} image files, {precision}, {args.workers} workers",
         f"{spread(args.count / np.array(times[1:]), 4)} images/s")      # the first one warms up
    show("embeddings: peak memory", memory(device))


def search(sizes):
    """Exact search at the full width: the GPU's time and its neighbours against the CPU's."""
    import neighbors
    rng = np.random.default_rng(0)
    means = rng.standard_normal((1000, sizes.width), dtype=np.float32)
    xb, xq = (means[rng.integers(0, 1000, n)] + rng.standard_normal((n, sizes.width), dtype=np.float32)
              for n in sizes.search)
    times, lists = {}, {}
    for device, rounds in ((sizes.device, 3), ("cpu", 1)):
        find = neighbors.searcher(xb, sizes.width, device=device)
        find(xq[:8], 10)
        times[device] = np.array([seconds(lambda find=find, device=device: lists.update({device: find(xq, 10)[1]}))
                                  for _ in range(rounds)])
    same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(lists[sizes.device], lists["cpu"], strict=True)])
    engine = "FAISS" if sizes.device == "cpu" else "PyTorch"
    show(f"exact search, {sizes.search[1]} queries in {sizes.search[0]} x {sizes.width}, {engine}",
         f"{spread(times[sizes.device])} s", f"{spread(times['cpu'] / times[sizes.device])} x the CPU's "
         f"{os.cpu_count()} cores; {same:.4f} of the neighbours are the same", "1.0000 of the neighbours")
    show("exact search: peak memory of PyTorch", memory(sizes.device))


# What runs, in this order, and its share of the time. Compiling takes longest: it comes last and has all that is left.
PARTS = {"GPU tests": (2.5, tests), "steps": (2, lambda sizes: steps(sizes, 0)), "epochs": (2.5, epochs),
         "embeddings": (0.7, dump), "search": (0.7, search), "compiled steps": (2, lambda sizes: steps(sizes, 1))}


def sizes_of(args):
    """-> what the parts are run on."""
    tiny = args.tiny
    turns = {"rounds": 2, "repeat": 1, "warmup": 1} if tiny else {"rounds": 5, "repeat": 4, "warmup": 3}
    model = {"arch": "resnet18" if tiny else "resnet50", "batch_size": 4 if tiny else 512, "precision": None,
             "device": torch.device(args.device)}
    return SimpleNamespace(
        device=args.device, pixels=[32] if tiny else [160, 192], width=64 if tiny else 2048,
        search=(500, 20) if tiny else (200_000, 2000), preparation=(36, 32) if tiny else (256, 224),
        step=model | turns | {"classes": 10 if tiny else 1000},
        epoch=model | turns | {"head": "MRL", "compile": 0, "classes": 10, "resolution": 32 if tiny else 160,
                               "epochs": 3, "count": 40 if tiny else 8192, "pixels": 64 if tiny else 500,
                               "workers": 1 if tiny else os.cpu_count()})


# ------------------------------------------------------------------------------------------------ the table

def run_part(name, args, limit):
    """Yield the rows of a part as they come; then one that says what went wrong, if anything did. limit: seconds."""
    words = [sys.executable, __file__, "--part", name, "--device", args.device, *(["--tiny"] if args.tiny else [])]
    stop = time.monotonic() + limit
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))      # and what it started
    timer.start()
    try:
        yield from (json.loads(line[4:]) for line in process.stdout if line.startswith("row "))
    except BaseException:      # Ctrl-C: a session of its own does not hear of it
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.wait()
        timer.cancel()
    if process.returncode == -signal.SIGKILL and time.monotonic() >= stop:
        yield [name, f"STOPPED: its {limit:.0f} s were over", "", ""]
    elif process.returncode:
        yield [name, f"FAILED: exit status {process.returncode}, see standard error", "", ""]


def main():
    args = arguments()
    if args.part:
        return PARTS[args.part][1](sizes_of(args))
    find_device(args.device)
    card, rows = machine(args.device), []
    print(f"{card}\n\n| what | median (min–max) | ratio | aim |\n| --- | --- | --- | --- |")
    for row in all_rows(args):
        print(f"| {' | '.join(row)} |", flush=True)
        rows.append(row)
        write_json(args.output, {"machine": card, "rows": rows})
    sys.exit(any(figure.startswith(WRONG) for _, figure, _, _ in rows))


def all_rows(args):
    """Yield the rows of all parts; of the time that is left each gets its share."""
    end, shares = time.monotonic() + 60 * args.minutes, [PARTS[name][0] for name in args.parts]
    for i, name in enumerate(args.parts):
        limit = (end - time.monotonic()) * shares[i] / sum(shares[i:])
        yield from run_part(name, args, limit) if limit >= LEAST else [[name, "NOT RUN: time", "", ""]]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (%(default)s)")
    parser.add_argument("--output", type=file_path, default="gpu.json", help="the rows as JSON (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="each part in seconds: does it run?")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="(all)")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main)
