"""Search by the processes that torchrun starts: each in its own rows of the database, their lists merged into one.

    torchrun --nproc_per_node=4 retrieve.py search ...           # any command; on several machines as torchrun does it

The first process runs the command. Where that searches, it asks the others, which do nothing else: `serve`. All of them
open the same files, but only the first writes lists; a process keeps an index of its own rows. Without torchrun the
first is the only one, and its rows are all of them.
"""
import os
import socket
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import neighbors
import numpy as np
import torch
import torch.distributed as dist
from study import Study
from tqdm import tqdm

from mrl_files import InputError, ended_by_sigterm, gather, rank, world

MERGED = 2 ** 28      # bytes of all processes' lists that are in the first one's memory at a time


# ------------------------------------------------------------------------------------------------ the processes

def join():
    """Meet the other processes, if torchrun has started any. -> is this the first?"""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        with ended_by_sigterm():
            dist.init_process_group("gloo", timeout=timedelta(days=7))      # as long as the first may do other things
    return rank() == 0


@contextmanager
def together():
    """Around what processes say to each other: one of them may have ended. The first says so, the others just end."""
    try:
        yield
    except RuntimeError as error:
        if rank():
            sys.exit(1)
        raise InputError("torchrun: one of the processes has ended before its time (out of memory?); the same command "
                         f"goes on where this one stopped ({str(error).splitlines()[0]})") from None


def tell(*message):
    """From the first process to all."""
    if world() > 1:
        with together():
            dist.broadcast_object_list([message])


def listen():
    message = [None]
    with together():
        dist.broadcast_object_list(message)
    return message[0]


def agree(work, *args):
    """-> work(*args), when all processes have done theirs. If one of them fails, the first raises its error, and the
    others get None."""
    result = stopped = None
    try:
        result = work(*args)
    except (InputError, OSError, MemoryError) as error:
        stopped = error
    with together():
        everyone = gather(stopped)
    if not any(everyone):
        return result
    if rank() == 0:
        raise next(filter(None, everyone))
    return None


# ------------------------------------------------------------------------------------------------ their searches

def searcher(study, dim, file, record):
    """`neighbors.searcher` over all processes, for the first -> find(lo, hi, k) -> D, I [hi - lo, k] of those queries.

    D and I are those of one pass; of equal distances in different parts the earlier rows come first. file, record: of
    the index of the whole; a part's has the part in its name and record.
    """
    of = dim, file, record, study.data(dim).record
    tell(study.task, *of)
    part = agree(Part, study, *of)

    def find(lo, hi, k):
        tell(lo, hi, k)
        return merge_all(*agree(part.find, lo, hi, k))
    return find


def serve():
    """What all processes but the first do: search when it asks for it, until it has ended."""
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)      # the first one's bars speak for all
    while asked := listen():
        if len(asked) > 3:
            part = None                    # its memory first
            part = agree(open_part, *asked)
        elif found := agree(part.find, *asked):
            merge_all(*found)


def dismiss():
    """The command has ended: let the others end too."""
    tell()


def open_part(task, *of):
    return Part(Study(task), *of)


def part_file(file, part, parts):
    """-> where a part's index lies, beside that of the whole."""
    return file if parts == 1 else file.with_name(f"{file.stem}_part{part + 1}of{parts}{file.suffix}")


class Part:
    """A process's rows of the database, ready to be searched."""

    def __init__(self, study, dim, file, record, embeddings):
        task, self.data = study.task, study.data(dim)
        for of in ("database", "queries"):
            check_same(self.data.record[of], embeddings[of])
        self.first, end = (len(self.data.xb) * process // world() for process in (rank(), rank() + 1))
        if self.first == end:
            raise InputError(f"torchrun: {world()} processes are more than the database has vectors")
        self.rows = self.data.xb[self.first:end]
        if world() > 1:
            record = record | {"part": [self.first, end]}
        self.search = neighbors.searcher(self.rows, dim, task.index, part_file(file, rank(), world()), record,
                                         task.device, task.memory_gb, task.nlist, task.nprobe, self.first)

    def find(self, lo, hi, k):
        """-> D, I [hi - lo, k], I in rows of the whole database; a part of fewer rows leaves places at infinity."""
        here = min(k, len(self.rows))
        D, I = self.search(self.data.xq[lo:hi], here, lo)
        if self.first:
            I[I >= 0] += self.first
        missing = ((0, 0), (0, k - here))
        return (D, I) if here == k else (np.pad(D, missing, constant_values=np.inf),
                                         np.pad(I, missing, constant_values=-1))


def check_same(here, there):
    """All processes must have the same embeddings: each opens its own machine's files."""
    if (here["shape"], here["rows"]) != (there["shape"], there["rows"]):
        raise InputError(f"{socket.gethostname()}: {here['file']} is another file than the first process's; all need "
                         "the same embeddings")


# ------------------------------------------------------------------------------------------------ their lists

def merge_all(D, I):
    """-> D, I [q, k] of all processes' lists, in the first one; a block of queries at a time goes to its memory."""
    block = max(1, MERGED // (I.shape[1] * (D.itemsize + I.itemsize) * world()))
    for lo in range(0, len(D) if world() > 1 else 0, block):
        block_D, block_I = gather_arrays(D[lo:lo + block]), gather_arrays(I[lo:lo + block])
        if rank() == 0:
            D[lo:lo + block], I[lo:lo + block] = merge(block_D, block_I)
    return D, I


def gather_arrays(x):
    """-> every process's x, in the first one."""
    parts = [torch.empty(x.shape, dtype=torch.from_numpy(x).dtype) for _ in range(world())] if rank() == 0 else None
    with together():
        dist.gather(torch.from_numpy(x), parts)
    return parts and [part.numpy() for part in parts]


def merge(D, I):
    """Lists of parts D, I [q, k] -> those of the whole [q, k]. Stable: of equal distances the earlier part's first."""
    k, D, I = D[0].shape[1], np.concatenate(D, 1), np.concatenate(I, 1)
    nearest = np.argsort(D, 1, kind="stable")[:, :k]      # each part's is sorted, which a stable sort makes use of
    return np.take_along_axis(D, nearest, 1), np.take_along_axis(I, nearest, 1)
