"""What the benchmarks share: the machine, seconds, private memory, made-up pictures, and how a figure is shown."""
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def machine(device="cpu"):
    """-> one line: processor, cores, load, GPU, versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.device(device).type == "cuda" else ""
    return (f"{cpu}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), {torch.get_num_threads()} threads{gpu}; "
            f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")


def spread(values, digits=3):
    """Median (min–max)."""
    return f"{np.median(values):.{digits}g} ({np.min(values):.{digits}g}–{np.max(values):.{digits}g})"


def seconds(work, device="cpu", repeat=1):
    """Of one call of work(), over `repeat` calls; a GPU is waited for before and after."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeat


def take_turns(works, rounds, device="cpu", repeat=1):
    """works {name: function} -> {name: seconds [rounds]}; in each round all of them take their turn."""
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device, repeat))
    return {name: np.array(values) for name, values in times.items()}


def private_mb(pid):
    """RssAnon of a process and its children, MB: the pages of mapped files do not count. 0 once it has ended."""
    return memory_mb(pid)[0]


def memory_mb(pid):
    """-> [RssAnon, RssFile] of a process and its children, MB: private memory, and the pages of mapped files (programs
    among them), which the system may take back. 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except (FileNotFoundError, ProcessLookupError):
        return np.zeros(2)
    own = [float(found[1]) / 1024 if (found := re.search(rf"{kind}:\s+(\d+)", status)) else 0
           for kind in ("RssAnon", "RssFile")]
    return sum(map(memory_mb, children), np.array(own))


def watch(command):
    """Run a command -> (seconds, its peak private MB, the peak of private and mapped MB together), sampled 50 times a
    second."""
    process, peaks, start = subprocess.Popen(command), np.zeros(2), time.perf_counter()
    while process.poll() is None:
        private, mapped = memory_mb(process.pid)
        peaks = np.maximum(peaks, [private, private + mapped])
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return time.perf_counter() - start, *peaks


def make_images(folder, count, pixels, different=250):
    """Photograph-like: smooth colours with noise on top, 4:3, as JPEGs in ten class folders. pixels: longest side.

    Only the first `different` (a multiple of ten) are drawn, at 9 ms each for 500 pixels; the others are links to them.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        path = Path(folder, str(i % 10), f"{i}.jpeg")
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= different:
            os.link(path.with_name(f"{i % different}.jpeg"), path)
            continue
        smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(smooth.resize((pixels, pixels * 3 // 4), Image.BICUBIC))
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
