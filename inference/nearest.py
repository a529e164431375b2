"""Exact 1-nearest-neighbour search at several representation sizes at once (Table 2). Used by baselines.py."""
import sys
from itertools import pairwise

import numpy as np
import torch
from tqdm import tqdm

from mrl_files import InputError

QUERIES, DATABASE = 4096, 16384            # rows multiplied at a time


def nearest(xb, xq, sizes, device="cpu"):
    """The nearest database row of each query, by L2 distance of unit-normalised prefixes.

    xb [n, D], xq [q, D] (arrays, may be memory-mapped), sizes: G increasing -> I [G, q] int64, the first among equals.
    The products of a size are those of the size before plus the next slice's, so that all sizes together cost one
    product at the largest. Rows of zeros have cosine 0 to all, and are counted in a note.
    """
    note_zeros(xb, sizes[0])
    blocks = [nearest_block(xb, on_device(xq[start:start + QUERIES], device), sizes)
              for start in tqdm(range(0, len(xq), QUERIES), desc="1-NN", unit="block")]
    return torch.cat(blocks, dim=1).cpu().numpy()


def note_zeros(xb, size):
    """Say how many rows are zero at the smallest size; at others there are as many or fewer."""
    count = sum(int((~np.any(xb[lo:lo + DATABASE, :size], axis=1)).sum()) for lo in range(0, len(xb), DATABASE))
    if count:
        print(f"note: {count} of {len(xb)} vectors of the database are zero in their first {size} numbers: "
              "cosine 0 to all, found last", file=sys.stderr)


def nearest_block(xb, xq, sizes):
    best = xq.new_full((len(sizes), len(xq)), -torch.inf)
    index = torch.zeros(len(sizes), len(xq), dtype=torch.int64, device=xq.device)
    for start in range(0, len(xb), DATABASE):
        for g, score in enumerate(scores(on_device(xb[start:start + DATABASE], xq.device), xq, sizes)):
            value, row = score.max(dim=1)
            closer = value > best[g]
            best[g] = torch.where(closer, value, best[g])
            index[g] = torch.where(closer, row + start, index[g])
    return index


def scores(xb, xq, sizes):
    """Yields [q, n] per size: the cosine, largest where the L2 distance of the unit vectors is smallest."""
    products, tiny = 0, torch.finfo(torch.float32).tiny
    for begin, end in pairwise([0, *sizes]):
        products = products + xq[:, begin:end] @ xb[:, begin:end].T
        b, q = xb[:, :end].norm(dim=1), xq[:, :end].norm(dim=1)
        yield products / q.clamp(min=tiny)[:, None] / b.clamp(min=tiny)


def on_device(rows, device):
    """Rows of embeddings -> float32 tensor; InputError where they are NaN or infinite: nearest to nothing."""
    x = torch.empty(rows.shape)      # not NumPy's memory: PyTorch 2.6 may free that after Python's end, and then hangs
    x.numpy()[...] = rows
    if not x.isfinite().all():
        raise InputError(f"{getattr(rows, 'filename', None) or 'the embeddings'}: holds NaN or infinite numbers; "
                         "write it again with pytorch_inference.py --retrieval --precision fp32")
    return x.to(device)
