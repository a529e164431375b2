"""The processes that torchrun starts for inference: each one's device, and what they decide or do together."""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from mrl_files import InputError, ended_by_sigterm, find_device, gather, rank


def start_device(args):
    """-> the device; under torchrun this process's own, after joining the group (gloo: only barriers are needed)."""
    name, several = args.device, count_processes() > 1
    if several and name.startswith("cuda") and (gpus := torch.cuda.device_count()):
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}"
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)      # the thread that pins batches asks for no other: it would go to GPU 0
    if several:
        with ended_by_sigterm():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
    return device


def count_processes():
    """How many torchrun has started."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def run_by_first(work, *args):
    """Call work(*args) in the first process while the others wait."""
    run_together(work if rank() == 0 else lambda *_: None, *args)


def run_together(work, *args):
    """Call work(*args) in every process and return its result. An error in one process stops all; one reports it."""
    result = error = None
    try:
        result = work(*args)
    except (InputError, OSError) as caught:
        error = caught
    stopped = gather(error is not None)
    if any(stopped):
        raise error if stopped.index(True) == rank() else SystemExit(1)
    return result


def barrier():
    if dist.is_initialized():
        dist.barrier()


def warn(text):
    """Once, whichever number of processes there are."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr)
