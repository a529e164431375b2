"""Accuracy of dumped embeddings per size, beside which the paper's Tables 1, 2 and 15 put MRL.

    python baselines.py knn --arrays arrays/ --model mrl1_e0_ff2048                    1-nearest-neighbour (Table 2)

Reads the arrays that pytorch_inference.py --retrieval writes (database: split train, queries: val), prints a table
and writes it as JSON: {"sizes": [...], "top1": [...], ...}, accuracies as fractions.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from saved_files import read_arrays, write_json
from tqdm import tqdm

from MRL import InputError, check_nesting_list, command_line, default_nesting_list

QUERIES, DATABASE = 4096, 16384            # rows multiplied at a time


# ------------------------------------------------------------------------------------------------ 1-NN

def nearest(xb, xq, sizes, device="cpu"):
    """The nearest database row of each query by L2 distance of unit-normalised prefixes, for all sizes at once.

    xb [n, D], xq [q, D] (arrays, may be memory-mapped) -> I [G, q] int64, the first among equals.
    The products of size d are those of the size before plus the next slice's, so that all sizes cost one product at
    the largest. Rows of zeros stay zeros, as in faiss.
    """
    return torch.cat([nearest_block(xb, xq[start:start + QUERIES], sizes, device)
                      for start in tqdm(range(0, len(xq), QUERIES), desc="1-NN", unit="block")], dim=1).numpy()


def nearest_block(xb, xq, sizes, device):
    xq = on_device(xq, device)
    best = torch.full((len(sizes), len(xq)), -torch.inf, device=device)
    index = torch.zeros(len(sizes), len(xq), dtype=torch.int64, device=device)
    for start in range(0, len(xb), DATABASE):
        block = on_device(xb[start:start + DATABASE], device)
        for g, score in enumerate(scores(block, xq, sizes)):
            value, row = score.max(dim=1)
            closer = value > best[g]
            best[g, closer], index[g, closer] = value[closer], row[closer] + start
    return index.cpu()


def scores(xb, xq, sizes):
    """Yields for each size [q, n]: cosine - |xb|^2 / 2, largest where the distance of the unit vectors is smallest."""
    products = 0
    for begin, end in zip([0, *sizes], sizes, strict=False):
        products = products + xq[:, begin:end] @ xb[:, begin:end].T
        b, q = xb[:, :end].norm(dim=1), xq[:, :end].norm(dim=1)
        tiny = torch.finfo(torch.float32).tiny
        yield products / q.clamp(min=tiny)[:, None] / b.clamp(min=tiny) - 0.5 * (b > 0)


def on_device(rows, device):
    return torch.from_numpy(np.array(rows, dtype=np.float32)).to(device)


def knn(args):
    xb, yb, about = read_arrays(args.arrays, "1K" if args.dataset == "V2" else args.dataset, "train", args.model)
    xq, yq, about_queries = read_arrays(args.arrays, args.dataset, "val", args.model)
    if about.get("checkpoint") != about_queries.get("checkpoint"):
        raise InputError(f"{args.arrays}: database and queries of {args.model} come from different checkpoints")
    sizes = sizes_of(args, about, xb.shape[1])
    hits = yb[nearest(xb, xq, sizes, args.device)] == yq
    return {"checkpoint": about.get("checkpoint"), "database": len(xb), "queries": len(xq),
            "sizes": sizes, "top1": hits.mean(axis=1).tolist()}


# ------------------------------------------------------------------------------------------------ command

def sizes_of(args, about, width):
    """--sizes, else the sizes the model was trained with, else powers of two from 8."""
    sizes = check_nesting_list(args.sizes or about.get("nesting_list") or default_nesting_list(width))
    if sizes[-1] > width:
        raise InputError(f"--sizes: {sizes[-1]} is more than the {width} dimensions of {args.model}")
    return sizes


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (knn,):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(run=command)
        sub.add_argument("--arrays", default=".", help="folder of the arrays")
        sub.add_argument("--model", default="mrl1_e0_ff2048", help="the model's name in the arrays' names")
        sub.add_argument("--dataset", default="1K", choices=["1K", "V2", "4K"])
        sub.add_argument("--sizes", type=int, nargs="+", help="default: those of the model")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--output", help="folder for the figures (default: that of the arrays)")
    return parser.parse_args()


def main():
    args = arguments()
    result = {"command": args.command, "model": args.model, "dataset": args.dataset, **args.run(args)}
    path = Path(args.output or args.arrays) / f"{args.command}_dataset={args.dataset}_model={args.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"{args.model}, {args.dataset}, {args.command}\n{'size':>6}  top-1 %")
    for size, top1 in zip(result["sizes"], result["top1"], strict=True):
        print(f"{size:>6}  {100 * top1:7.2f}")


if __name__ == "__main__":
    command_line(main)
