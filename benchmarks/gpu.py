"""One table of what only a GPU can show: training, validation, resuming, embeddings, search. Started by gpu.sh.

    PYTHONPATH=train:inference:retrieval python benchmarks/gpu.py
    PYTHONPATH=train:inference:retrieval python benchmarks/gpu.py --tiny --device cpu        each part, in seconds

Each part runs in a process of its own, within what is left of --minutes: one that fails or takes too long is named in
its place, and the others go on. Exit status 1 if one failed. Rows: what, figure (median, min–max), ratio, aim.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import machine, make_images, seconds, spread

from mrl_files import command_line, file_path, write_json

INFERENCE = Path(__file__).resolve().parent.parent / "inference"
STEP_AIM, HEAD_AIM = "1.4 or more", "1.01 or less"


def show(what, figure, ratio="", aim=""):
    """A row for the table: printed here, read by the process that started this one."""
    print("row " + json.dumps([what, figure, ratio, aim]), flush=True)


# ------------------------------------------------------------------------------------------------ parts

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
        show(f"{label}: peak memory of MRL's", peak_memory(works["ours", "MRL"], pixels, args))


def peak_memory(step, pixels, args):
    if args.device.type != "cuda":
        return "no GPU"
    images = torch.zeros(args.batch_size, pixels, pixels, 3, dtype=torch.uint8, device=args.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(images, torch.zeros(args.batch_size, dtype=torch.int64, device=args.device))
    return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB (with the other models' weights)"


def epochs(sizes):
    """Training fed by FFCV from a file of JPEGs and raw pixels; its validation; the same run killed and resumed."""
    import train_epoch
    args = train_epoch.device_and_precision(SimpleNamespace(**sizes.epoch))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_images(folder / "images", args.count, args.pixels)
        train_epoch.write_file(folder / "images", folder / "train.ffcv", args.pixels)
        speed, waiting = train_epoch.train(folder / "train.ffcv", args.workers, folder / "runs", args)
        show(f"epochs of {args.count} images from FFCV, {args.workers} workers", f"{spread(speed, 4)} images/s",
             f"{spread(100 * waiting)} % waiting", "less than 5 %")
        whole = folder / "runs" / str(args.workers)
        last = json.loads((whole / "log").read_text(encoding="utf-8").splitlines()[-1])
        show("validation", f"{last['val_images'] / last['val_time']:.4g} images/s, compilation of FFCV included")
        show("peak memory of the training process", f"{last['peak_memory_mb'] / 1024:.1f} GiB")
        show("killed (SIGKILL) after an epoch and resumed", f"weights differ by at most {killed(whole, folder):.2g} "
             "of a tensor's largest")


def killed(whole, folder):
    """Begin the run of the folder `whole` again, kill it after its first epoch, resume it -> how far the ends lie
    apart. On a GPU sums come in any order: not 0."""
    import checkpoint
    import train_epoch
    settings = checkpoint.saved_settings(whole)
    settings["logging"]["name"] = "killed"
    words = [f"--{section}.{key}={value}" for section, values in settings.items() for key, value in values.items()]
    process = subprocess.Popen([sys.executable, "train_imagenet.py", *words], cwd=train_epoch.TRAIN,
                               stdout=subprocess.DEVNULL)
    run = whole.with_name("killed")
    while process.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_epoch.python("train_imagenet.py", f"--training.resume={run}")
    one, other = (torch.load(path / "final_weights.pt", weights_only=True) for path in (whole, run))
    return max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)).item()
               for k in one if one[k].is_floating_point())


def embeddings(sizes):
    """The dump that retrieval reads, from image files, in half precision."""
    from mrl_models import build_model
    args = SimpleNamespace(**sizes.epoch)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for split in ("train", "val"):
            make_images(folder / split, args.count if split == "train" else 40, args.pixels)
        model = build_model(args.arch, "mrl", num_classes=10)
        torch.save(model.state_dict(), folder / "final_weights.pt")
        write_json(folder / "params.json", {"model": model.spec})
        words = ["--path", folder / "final_weights.pt", "--retrieval", "--data_root", folder, "--device", sizes.device,
                 "--retrieval_array_path", folder, "--workers", args.workers, "--batch_size", min(256, args.batch_size)]
        time_taken = seconds(lambda: subprocess.run(
            [sys.executable, "pytorch_inference.py", *map(str, words)], cwd=INFERENCE, check=True,
            stdout=subprocess.DEVNULL))
    show(f"embeddings of {args.count + 40} image files, fp16, {args.workers} workers",
         f"{(args.count + 40) / time_taken:.4g} images/s, start included")


def search(sizes):
    """Exact search at the full width: the GPU's time and its neighbours against the CPU's."""
    import neighbors
    rng = np.random.default_rng(0)
    means = rng.standard_normal((1000, sizes.width), dtype=np.float32)
    xb, xq = (means[rng.integers(0, 1000, n)] + rng.standard_normal((n, sizes.width), dtype=np.float32)
              for n in sizes.search)
    times, lists = {}, {}
    for device in (sizes.device, "cpu"):
        find = neighbors.searcher(xb, sizes.width, device=device)
        find(xq[:8], 10)
        times[device] = [seconds(lambda find=find, device=device: lists.update({device: find(xq, 10)[1]}))
                         for _ in range(3 if device != "cpu" else 1)]
    same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(lists[sizes.device], lists["cpu"], strict=True)])
    show(f"exact search, {sizes.search[1]} queries in {sizes.search[0]} x {sizes.width}",
         f"{spread(np.array(times[sizes.device]))} s", f"{times['cpu'][0] / np.median(times[sizes.device]):.3g} x the "
         f"CPU's {os.cpu_count()} cores; {same:.4f} of the neighbours are the same", "1.0000 of the neighbours")


PARTS = {"steps": lambda sizes: steps(sizes, 0), "compiled steps": lambda sizes: steps(sizes, 1), "epochs": epochs,
         "embeddings": embeddings, "search": search}


def sizes_of(args):
    """-> what the parts are run on."""
    arch, batch = ("resnet18", 4) if args.tiny else ("resnet50", 512)
    turns = {"rounds": 2, "repeat": 1, "warmup": 1} if args.tiny else {"rounds": 5, "repeat": 5, "warmup": 5}
    model = {"arch": arch, "classes": 10, "batch_size": batch, "precision": None, "device": torch.device(args.device)}
    workers = os.cpu_count()
    return SimpleNamespace(
        device=args.device, pixels=[32] if args.tiny else [160, 192], width=64 if args.tiny else 2048,
        search=(500, 20) if args.tiny else (200_000, 2000), step=model | turns | {"classes": 10 if args.tiny else 1000},
        epoch=model | turns | {"head": "MRL", "compile": 0, "resolution": 32 if args.tiny else 160, "epochs": 3,
                               "count": 40 if args.tiny else 8192, "pixels": 64 if args.tiny else 500,
                               "workers": 1 if args.tiny else workers})


# ------------------------------------------------------------------------------------------------ the table

def run_part(name, args, seconds_left):
    """-> (rows, what went wrong or None)."""
    words = [sys.executable, __file__, "--part", name, "--device", args.device, *(["--tiny"] if args.tiny else [])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=max(1, seconds_left))
        wrong = None if process.returncode == 0 else (err.strip().splitlines() or [f"status {process.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)      # and what it started
        out, _ = process.communicate()
        wrong = f"not finished: {args.minutes} minutes are over"
    return [json.loads(line[4:]) for line in out.splitlines() if line.startswith("row ")], wrong


def print_row(what, figure, ratio, aim):
    print(f"| {what} | {figure} | {ratio} | {aim} |", flush=True)


def main():
    args = arguments()
    if args.part:
        return PARTS[args.part](sizes_of(args))
    end, table, failed = time.monotonic() + 60 * args.minutes, [], {}
    print(f"{machine(args.device)}\n")
    print_row("what", "median (min–max)", "ratio", "aim")
    print_row("---", "---", "---", "---")
    for name in args.parts:
        rows, wrong = run_part(name, args, end - time.monotonic())
        if wrong:
            failed[name] = wrong
            rows.append([name, f"FAILED: {wrong}", "", ""])
        for row in rows:
            print_row(*row)
        table += rows
    write_json(args.output, {"machine": machine(args.device), "rows": table, "failed": failed})
    sys.exit(bool(failed))


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
