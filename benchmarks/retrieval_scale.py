"""Memory and time of retrieval from a database that is larger than the memory it may use: ImageNet-1K's size.

    PYTHONPATH=retrieval python benchmarks/retrieval_scale.py [--folder DIR] [--n 1281167] [--queries 10000]

Writes made-up embeddings of n x 2,048 float32 (10.5 GB for ImageNet-1K) to a temporary folder and removes them, then
runs the commands a user runs, serves the index they built, and watches their memory: what is private (RssAnon), and
what is resident in all (with RssFile, the pages of mapped files).
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import machine, seconds, watch
from retrieval_speed import SHORTLIST, SMALL, D, write_world
from serving import adaptive_searcher, read_adaptive_index

from mrl_files import file_path

SCRIPT = Path(__file__).resolve().parent.parent / "retrieval" / "retrieve.py"
ADAPTIVE = f"--retrieval_dim {SMALL} --rerank_dims {D} --shortlist {SHORTLIST}"
SERVED = "1K_64dim_ivf_sq8-reranked256_50shortlist_float16.index"
COMMANDS = {
    "shortlist at 16": (f"search --sizes {SMALL} --k {SHORTLIST}", 3),
    "re-rank at 2048": (f"rerank {ADAPTIVE}", 3),
    "both again, from what is there": (f"rerank {ADAPTIVE}", 3),
    "index: ivf_sq8 64 -> 256 fp16": ("index --index ivf_sq8 --retrieval_dim 64 --rerank_dim 256 --storage float16 "
                                      "--shortlist 50", 1.2)}


def serve(folder):
    """Runs in a process of its own: all queries, a thousand at a time, from the file that `index` has written."""
    find = adaptive_searcher(read_adaptive_index(folder / "index_files/mrl" / SERVED), 10, 50)
    queries = np.load(folder / f"1K_val_mrl1_e0_ff{D}-X.npy", mmap_mode="r")
    for lo in range(0, len(queries), 1000):
        find(queries[lo:lo + 1000])


def show(name, command, target):
    took, private, resident = watch([sys.executable, *map(str, command)])
    print(f"{name:<32}{took:8.1f} s   peak private memory {private / 1e3:.2f} GB   (target <= {target})   with mapped "
          f"files {resident / 1e3:.2f} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=file_path, help="where to write (a temporary folder); all is removed after")
    parser.add_argument("--n", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--serve", type=file_path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(Path(args.serve))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure(Path(name), args.n, args.queries)


def measure(folder, n, queries):
    written = seconds(lambda: write_world(folder, n, queries))
    print(f"{machine()}; {n:,} x {D} float32 written in {written:.0f} s", flush=True)
    for name, (command, target) in COMMANDS.items():
        show(name, [SCRIPT, *command.split(), "--embeddings", folder, "--output", folder], target)
    size = (folder / "index_files/mrl" / SERVED).stat().st_size
    show("serving it", [__file__, "--serve", folder], 1.2)
    print(f"the index's file: {size / 1e9:.2f} GB, {size / n:.0f} bytes a vector")


if __name__ == "__main__":
    main()
