"""One process or many: start them, say who each is, and let them agree. Used by train_imagenet.py and trainer.py.

    --training.distributed=1 --dist.world_size=2        this script starts the processes, as the original
    torchrun --nproc_per_node=2 train_imagenet.py ...   torchrun starts them; its environment wins
"""
import math
import os
import re
import signal
import socket
import sys
import time
import uuid
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mrl_files import InputError, command_line, ended_by_sigterm, find_device, leave_group, world

FLAG = "--training.device"
# After one process has ended, the others get this many seconds to end too: PyTorch would end them at once, and say so.
GRACE = {"grace_period": 60} if "grace_period" in signature(mp.ProcessContext.join).parameters else {}


class StoppedTogether(SystemExit):
    """All processes end here, as they have agreed."""


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first():
    """Before the processes meet: is this the one that prints and writes?"""
    return not under_torchrun() or os.environ["RANK"] == "0"


def torchrun_name():
    """-> a name that torchrun's restarts of the same run share, None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":
        return run_id
    logs = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2]      # its new folder .../none_<random>
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(logs)))


def world_size(settings):
    """-> how many processes train: torchrun's, else what the settings ask for."""
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return settings.dist.world_size if settings.training.distributed else 1


def check_devices(settings):
    """InputError where the processes cannot all have their device, or cannot meet."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else settings.dist.world_size
    if settings.training.device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--training.device=cuda: PyTorch sees no GPU here; --training.device=cpu trains without")
        if here > torch.cuda.device_count():
            raise InputError(f"{'--nproc_per_node' if under_torchrun() else '--dist.world_size'}={here}: "
                             f"this machine shows {torch.cuda.device_count()} GPUs")
    if under_torchrun():
        check_restarts()
    elif here > 1:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.dist.address, int(settings.dist.port)))
            except (OSError, ValueError, OverflowError) as error:
                raise InputError(f"--dist.address={settings.dist.address} --dist.port={settings.dist.port}: "
                                 f"{getattr(error, 'strerror', error)}; choose another") from None


def check_restarts():
    """torchrun keeps one store over all restarts, where the processes then find each other's old addresses. On one node
    `meeting_place` avoids them; on several, a variable makes torchrun start a store each time."""
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0" \
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise InputError("torchrun --max-restarts: on several nodes restarts need --rdzv_backend=c10d and "
                         "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment")


def launch(worker, settings, *args):
    """Run worker(device, settings, *args) in every process of the world; returns, or exits, when all have ended."""
    if under_torchrun():
        run_worker(int(os.environ["LOCAL_RANK"]), worker, settings, *args)
    elif settings.dist.world_size == 1:
        worker(find_device(settings.training.device, FLAG), settings, *args)
    else:
        spawn(worker, settings, *args)


def spawn(worker, settings, *args):
    size = settings.dist.world_size
    os.environ.update(MASTER_ADDR=settings.dist.address, MASTER_PORT=settings.dist.port, WORLD_SIZE=str(size))
    # Otherwise each process starts a thread per core and they compete: half the speed on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // size)))
    context = mp.start_processes(run_spawned, (worker, settings, *args), nprocs=size, join=False, start_method="spawn")
    # The processes stop by themselves when asked to (StopRequest); this one passes the word on and waits.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda s, _: [os.kill(p.pid, s) for p in context.processes if p.is_alive()])
    try:
        while not context.join(**GRACE):
            pass
    except mp.ProcessExitedException as stopped:
        if stopped.exit_code < 0:      # killed: it could not say why
            raise InputError(f"process {stopped.error_index} was ended by {signal.Signals(-stopped.exit_code).name}"
                             f"{' (out of memory?)' if stopped.exit_code == -signal.SIGKILL else ''}; "
                             "go on with --training.resume=<the run folder named above>") from None
        sys.exit(stopped.exit_code)


def run_spawned(*args):
    try:
        command_line(lambda: run_worker(*args))
    except RuntimeError as error:
        if not re.search("(closed|reset) by peer", str(error)):
            raise
        sys.exit(1)      # the process that ended first has said why


def run_worker(local_rank, worker, settings, *args):
    rank, size = int(os.environ["RANK"]) if under_torchrun() else local_rank, int(os.environ["WORLD_SIZE"])
    os.environ["LOCAL_RANK"] = str(local_rank)      # what NCCL takes as its device; a shell may have left another
    cuda = settings.training.device == "cuda"
    device = find_device(f"cuda:{local_rank}" if cuda else "cpu", FLAG)
    if cuda:
        torch.cuda.set_device(device)
    with ended_by_sigterm():
        # gloo beside nccl: small messages between the hosts must not wait for the GPU's queue
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=meeting_place(rank, size), rank=rank,
                                world_size=size)
    try:
        worker(device, settings, *args)
    except BaseException as end:
        leave_group(together=isinstance(end, StoppedTogether))
        raise
    leave_group()


def meeting_place(rank, size):
    """The store through which the processes find each other.

    On one node torchrun keeps it over a restart, and PyTorch 2.15 then finds the addresses of the processes before:
    each start gets a prefix of its own. (Between nodes the numbers of restarts differ: see check_restarts.)
    """
    store, *_ = next(dist.rendezvous("env://", rank, size))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


# ------------------------------------------------------------------------------------------------ what they agree on
# With a single process each function returns its input unchanged.

class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that all processes answer alike: shall we stop after this step?

    A second Ctrl-C, a second or more after the first, ends the process at once. (Signals often come twice: to all
    processes of a terminal or a job, and passed on by what started them.)
    """

    def __init__(self):
        self.signum, self.first = 0, math.inf
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.note)

    def note(self, signum, _):
        if signum == signal.SIGINT and time.monotonic() > self.first + 1:
            raise KeyboardInterrupt
        self.signum, self.first = signum, min(self.first, time.monotonic())

    def asked(self):
        """-> the signal's number, 0 if there was none. Every process must call it after the same steps."""
        if world() == 1:
            return self.signum
        signum = torch.tensor(self.signum)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


def total(tensor):
    """-> the tensor, summed over all processes in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(item):
    """-> the first process's item (plain objects and CPU tensors), in every process."""
    if world() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, 0, device=torch.device("cpu"))
    return items[0]


def wait():
    """For all processes to come here. (Over gloo: a barrier of NCCL would also wait for the GPU.)"""
    share(None)


def share_buffers(model):
    """The first process's running statistics for all, so that they validate the same model."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
