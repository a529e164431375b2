"""Memory and time of retrieval from a database that is larger than the memory it may use: ImageNet-1K's size.

    PYTHONPATH=retrieval python benchmarks/retrieval_scale.py [--folder DIR] [--n 1281167] [--queries 10000]

Writes made-up embeddings of n x 2,048 float32 (10.5 GB for ImageNet-1K) to a temporary folder and removes them, then
runs the commands a user runs and watches their private memory (RssAnon: without the pages of mapped files).
"""
import argparse
import sys
import tempfile
from pathlib import Path

from measure import machine, seconds, watch
from retrieval_speed import SHORTLIST, SMALL, D, write_world

from mrl_files import file_path

COMMANDS = {
    "shortlist at 16": f"search --sizes {SMALL} --k {SHORTLIST}",
    "re-rank at 2048": f"rerank --retrieval_dim {SMALL} --rerank_dims {D} --shortlist {SHORTLIST}",
    "both again, from what is there": f"rerank --retrieval_dim {SMALL} --rerank_dims {D} --shortlist {SHORTLIST}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=file_path, help="where to write (a temporary folder); all is removed after")
    parser.add_argument("--n", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=10_000)
    args = parser.parse_args()
    script = Path(__file__).resolve().parent.parent / "retrieval" / "retrieve.py"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        written = seconds(lambda: write_world(Path(folder), args.n, args.queries))
        print(f"{machine()}; {args.n:,} x {D} float32 written in {written:.0f} s", flush=True)
        for name, command in COMMANDS.items():
            took, peak = watch([sys.executable, str(script), *command.split(),
                                "--embeddings", folder, "--output", folder])
            print(f"{name:<32}{took:8.1f} s   peak private memory {peak / 1e3:.2f} GB   (target <= 3)", flush=True)


if __name__ == "__main__":
    main()
