"""Communication between the processes of a run: stop requests, sums, gather and broadcast. Used by trainer.py.

Each function takes the launch.Process it runs in; with a single process it returns its input unchanged.
"""
import signal

import torch
import torch.distributed as dist


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that all processes answer alike: shall we stop after this step?

    A second Ctrl-C ends the process at once. (SIGTERM often comes twice: to all processes, and passed on by what
    started them.)
    """

    def __init__(self, process):
        self.alone, self.signum = process.alone, 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.note)

    def note(self, signum, _):
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    def asked(self):
        """-> the signal's number, 0 if there was none. Every process must call it after the same steps."""
        if self.alone:
            return self.signum
        signum = torch.tensor(self.signum)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


def total(process, tensor):
    """-> the tensor, summed over all processes in place."""
    if not process.alone:
        dist.all_reduce(tensor)
    return tensor


def mean_of_each(world_size, bucket):
    """DDP's mean over the processes, for each gradient by itself.

    DDP deals the gradients into other buckets after a start's first step, and gloo's sums over three or more processes
    depend on the place in a bucket: a resumed run would not be equal to the bit.
    """
    sums = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]

    def mean(_):
        for each in sums:
            each.value()      # raises what went wrong, such as the end of another process
        return bucket.buffer().div_(world_size)
    return torch.futures.collect_all(sums).then(mean)


def gather(process, item):
    """-> list of every process's item (plain objects), in each process."""
    if process.alone:
        return [item]
    items = [None] * process.world_size
    dist.all_gather_object(items, item)
    return items


def share(process, item):
    """-> the first process's item (plain objects and CPU tensors), in every process."""
    if process.alone:
        return item
    items = [item]
    dist.broadcast_object_list(items, 0, device=torch.device("cpu"))
    return items[0]


def wait(process):
    """For all processes to come here. (Over gloo: a barrier of NCCL would also wait for the GPU.)"""
    share(process, None)


def share_buffers(process, model):
    """The first process's running statistics for all, so that they validate the same model."""
    if not process.alone:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
