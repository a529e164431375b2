"""What MRL is compared with, from dumped embeddings: a table per size, and the same as JSON.

    python baselines.py lp  --model mrl0_e0_ff2048            a linear classifier refitted on the first d
                                                              features of an FF model ("Rand. LP")             Table 1
    python baselines.py svd --model mrl0_e0_ff2048 --path <final_weights.pt>
                                                              FF's classifier cut to rank d                    Table 1
    python baselines.py ncm --model mrl1_e0_ff2048 --dataset V2
                                                              few-shot nearest class mean, of the queries      Table 15

1-nearest-neighbour accuracy (Table 2) is the column `top1` of retrieval's exact search: `retrieve.py report`. Table 2's
SVD and random projection of features: `retrieve.py project`.
Reads the arrays of `pytorch_inference.py --retrieval` in --arrays (database: train, queries: val). Writes
`{command}_dataset={dataset}_model={model}.json`: sizes, top1 (fractions), settings.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from saved_files import fingerprint, read_arrays
from tqdm import tqdm
from which_model import open_checkpoint

from MRL import FixedFeatureLayer, Matryoshka_CE_Loss, MRL_Linear_Layer
from mrl_files import InputError, bounded, command_line, file_path, find_device, write_json
from mrl_models import check_nesting_list, classifier, default_nesting_list, fill_model, find_weights

ROWS = 4096                                # evaluated at a time


# ------------------------------------------------------------------------------------------------ on arrays

def linear_probe(X, y, sizes, epochs, lr, batch_size=1024, device="cpu"):
    """Fit a linear classifier on each prefix of frozen features: an MRL head whose matrices share nothing.

    X [n, D], y [n] int64 -> MRL_Linear_Layer. Adam, cosine learning rate down to 0.
    """
    torch.manual_seed(0)
    head, loss = MRL_Linear_Layer(sizes, int(y.max()) + 1).to(device), Matryoshka_CE_Loss()
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    steps = -(-len(X) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        batches = np.array_split(rng.permutation(len(X)), steps)
        for rows in tqdm(batches, desc=f"epoch {epoch + 1}/{epochs}", unit="batch", leave=False):
            rows.sort()                                                   # kinder to a memory-mapped file
            optimizer.zero_grad()
            loss(head(read_rows(X, rows, device)), torch.tensor(y[rows], device=device)).backward()
            optimizer.step()
            schedule.step()
    return head


@torch.inference_mode()
def measure_top1(logits_of, X, y, device="cpu"):
    """logits_of: features [n, D] -> G tensors [n, C]. -> [G] fractions of rows whose largest logit is the label's."""
    hits = sum(torch.stack([(logits.argmax(1).cpu() == torch.from_numpy(y[start:start + ROWS])).sum()
                            for logits in logits_of(read_rows(X, slice(start, start + ROWS), device))])
               for start in tqdm(range(0, len(X), ROWS), desc="top-1", unit="block", leave=False))
    return (hits / len(X)).tolist()


def read_rows(X, rows, device="cpu"):
    """Rows of embeddings -> float32 tensor; InputError, which names the file, where they are NaN or infinite."""
    chosen = X[rows]
    x = torch.empty(chosen.shape)    # not NumPy's memory: PyTorch 2.6 may free that after Python's end, and then hangs
    x.numpy()[...] = chosen
    if not x.isfinite().all():
        raise InputError(f"{getattr(X, 'filename', None) or 'the embeddings'}: holds NaN or infinite numbers; "
                         "write it again with pytorch_inference.py --retrieval --precision fp32")
    return x.to(device)


def truncate_classifier(weight, bias, ranks):
    """-> features [n, D] -> logits [n, C] of the best rank-d approximation of `weight` [C, D], for each rank d."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return lambda x: [x @ Vh[:d].T @ (U[:, :d] * S[:d]).T + bias for d in ranks]


def measure_class_means(X, y, sizes, shots, seed=0):
    """Few-shot accuracy: `shots` rows of each class give its mean of unit-normalised prefixes, the others are tested.

    -> [G]: fraction of the others whose nearest mean (L2) is their class's.
    """
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]                    # by class, random within
    labels, first, counts = np.unique(y[order], return_index=True, return_counts=True)
    if counts.min() <= shots:
        raise InputError(f"--shots {shots}: needs more than {shots} images of each class, class "
                         f"{labels[counts.argmin()]} has {counts.min()}; give fewer shots")
    support = order[first[:, None] + np.arange(shots)]                    # [C, shots]
    test = np.setdiff1d(order, support)
    hits = []
    for size in sizes:
        x = torch.nn.functional.normalize(read_rows(X, np.s_[:, :size]))
        means = x[support].mean(1)                                        # [C, size]
        hits.append(labels[torch.cdist(x[test], means).argmin(1).numpy()] == y[test])
    return np.mean(hits, axis=1).tolist()


# ------------------------------------------------------------------------------------------------ commands

def lp(args):
    (X, y), (xq, yq), about = read_both_splits(args)
    sizes = choose_sizes(args, about, X.shape[1])
    head = linear_probe(X, y, sizes, args.epochs, args.lr, device=args.device)
    return about, {"sizes": sizes, "top1": measure_top1(head, xq, yq, args.device),
                   "epochs": args.epochs, "lr": args.lr}


def svd(args):
    if not args.path:
        raise InputError("svd needs --path, the fixed-feature checkpoint whose classifier is cut")
    X, y, about = read_arrays(args.arrays, args.dataset, "val", args.model)
    if about.get("checkpoint") not in (None, fingerprint(args.path)):
        raise InputError(f"--path {args.path}: the arrays {args.model} in {args.arrays} come from another checkpoint")
    head = classifier(fill_model(*open_checkpoint(args.path, args.arch)))[1]
    if not isinstance(head, FixedFeatureLayer) or head.in_features != X.shape[1]:
        raise InputError(f"--path {args.path}: svd is for a fixed-feature model of {X.shape[1]} features")
    sizes = choose_sizes(args, about, X.shape[1])
    head.requires_grad_(False).to(args.device)
    logits = truncate_classifier(head.weight, head.bias, sizes)
    return about, {"sizes": sizes, "top1": measure_top1(logits, X, y, args.device)}


def ncm(args):
    X, y, about = read_arrays(args.arrays, args.dataset, "val", args.model)
    sizes = choose_sizes(args, about, X.shape[1])
    trials = {shots: [measure_class_means(X, y, sizes, shots, seed) for seed in range(args.trials)]
              for shots in args.shots}
    return about, {"sizes": sizes, "shots": args.shots, "trials": args.trials,
                   "top1": [np.mean(trials[shots], axis=0).tolist() for shots in args.shots],
                   "std": [np.std(trials[shots], axis=0).tolist() for shots in args.shots]}


def read_both_splits(args):
    """-> database (X, y), queries (X, y), what the companions say. V2 has queries only; its database is 1K's."""
    xb, yb, about = read_arrays(args.arrays, "1K" if args.dataset == "V2" else args.dataset, "train", args.model)
    xq, yq, about_queries = read_arrays(args.arrays, args.dataset, "val", args.model)
    if about.get("checkpoint") != about_queries.get("checkpoint") or xb.shape[1] != xq.shape[1]:
        raise InputError(f"{args.arrays}: database and queries of {args.model} come from different checkpoints")
    return (xb, yb), (xq, yq), about


def choose_sizes(args, about, width):
    """--sizes; else those of a nested model; else (one size, or unknown) powers of two from 8 up to the width."""
    own = about.get("nesting_list", [])
    sizes = check_nesting_list(args.sizes or (own if len(own) > 1 else default_nesting_list(width)), "--sizes")
    if sizes[-1] > width:
        raise InputError(f"--sizes: {sizes[-1]} is more than the {width} dimensions of {args.model}")
    return sizes


COMMANDS = {"lp": lp, "svd": svd, "ncm": ncm}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS), help="which comparison: above")
    parser.add_argument("--arrays", type=file_path, default=".", help="folder of the arrays (this one)")
    parser.add_argument("--model", default="mrl1_e0_ff2048", help="the model's name in the arrays' names (%(default)s)")
    parser.add_argument("--dataset", default="1K", choices=["1K", "V2", "4K"],
                        help="whose arrays (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", help="default: those of the model; for FF 8, 16 ... its width")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda or cuda:1 (here %(default)s)")
    parser.add_argument("--output", type=file_path, help="folder for the figures (default: that of the arrays)")
    parser.add_argument("--path", type=find_weights, help="svd: the fixed-feature checkpoint")
    parser.add_argument("--arch", help="svd: its architecture, where no params.json lies beside it (default resnet50)")
    parser.add_argument("--epochs", type=bounded(int, 1), default=10, help="lp: epochs of training (%(default)s)")
    parser.add_argument("--lr", type=bounded(float, 0), default=1e-3, help="lp: learning rate (%(default)s)")
    parser.add_argument("--shots", type=bounded(int, 1), nargs="+", default=[1, 3, 5, 7, 9],
                        help="ncm: queries of a class whose mean is taken; the others are tested (1 3 5 7 9)")
    parser.add_argument("--trials", type=bounded(int, 1), default=5,
                        help="ncm: random choices of the shots (%(default)s)")
    return parser.parse_args()


def show(result):
    """Print per cent: a row per size, a column per number of shots where there are shots."""
    columns = [f"{shots}-shot" for shots in result["shots"]] if "shots" in result else ["top-1 %"]
    table = pd.DataFrame(100 * np.atleast_2d(result["top1"]).T, index=result["sizes"], columns=columns)
    print(f"{result['command']}, {result['dataset']}, {result['model']}")
    print(table.rename_axis("size").to_string(float_format="{:.2f}".format))


def main():
    args = parse_arguments()
    find_device(args.device)
    torch.set_float32_matmul_precision("highest")      # a container may have allowed TF32
    about, figures = COMMANDS[args.command](args)
    result = {"command": args.command, "model": args.model, "dataset": args.dataset,
              "checkpoint": about.get("checkpoint"), **figures}
    folder = Path(args.output or args.arrays)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.command}_dataset={args.dataset}_model={args.model}.json"
    write_json(path, result)
    show(result)
    print(f"written to {path}")


if __name__ == "__main__":
    command_line(main)
