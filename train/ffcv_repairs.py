"""FFCV 1.0.2 imported without its side effects. Imported by all modules of this folder before anything else of FFCV."""
import gc

import numba.typed
import numpy as np
import torch

threads, typed_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict             # FFCV keeps two constants in one, which numba compiles for 3 seconds
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator  # noqa: E402
from ffcv.memory_managers import OSCacheManager  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.traversal_order import quasi_random  # noqa: E402

from mrl_files import keep_compiled  # noqa: E402

numba.typed.Dict = typed_dict
torch.set_num_threads(threads)      # importing FFCV sets it to 1


def set_num_threads(cls, number):
    """FFCV's own also sets PyTorch's threads, in the middle of training and for the whole process."""
    cls.num_threads = number
    numba.set_num_threads(number)


def compile_reader(self):
    """-> FFCV's way to read a stored image: the bytes at an address of the memory map.

    FFCV's own makes numba's shared type uint8[::1] read-only in place, which breaks the tables of functions compiled
    before and ends in tracebacks from their finalisers.
    """
    mapped, table = numba.types.Array(numba.uint8, 1, "C", readonly=True), numba.uint64[::1]

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address:address + size]

    return keep_compiled(mapped(numba.uint64, numba.types.Tuple([mapped, table, table])))(read)


run, next_batch, run_pipeline = EpochIterator.run, EpochIterator.__next__, EpochIterator.run_pipeline
close = EpochIterator.close


def run_and_tell(self):
    """FFCV's thread ends silently where it fails, and who waits for its next batch waits for ever.

    On a GPU a thread begins on the first one, and would take memory there. And the iterator's memory may be what was
    given back a moment ago: its streams begin after all that training has asked for until now, which may still read it.
    """
    if IS_CUDA:
        torch.cuda.set_device(self.current_stream.device)
        for stream in self.cuda_streams:
            stream.wait_stream(self.current_stream)
    try:
        run(self)
    except BaseException as error:
        self.failure = error
        self.output_queue.put(None)


def next_or_raise(self):
    try:
        return next_batch(self)
    except StopIteration:
        if self.failure is not None:
            raise RuntimeError(f"FFCV could not make the next batch: {self.failure}") from self.failure
        raise


def run_after_copy(self, number, images, slot, event):
    """FFCV orders only what the GPU does: the copy out of this slot's pinned memory may still wait there, when the CPU
    writes the next batch into it. The thread that decodes waits for it; training does not."""
    if self.terminate_event.is_set():
        raise StopIteration              # closed: FFCV itself looks only where its queue is full
    if IS_CUDA:
        self.cuda_streams[slot].synchronize()
    batch = run_pipeline(self, number, images, slot, event)
    if not self.loader.compiled:
        self.loader.compiled = True
        gc.collect()      # numba has left exceptions in a cycle, whose frames hold this iterator and all its buffers
    return batch


def close_and_empty(self):
    """FFCV's thread says that it has ended by a last item, and waits for ever where the queue is full and not read."""
    close(self)
    while not self.output_queue.empty():
        self.output_queue.get_nowait()


EpochIterator.failure = None         # of the class: the thread starts before an instance could set it
EpochIterator.run, EpochIterator.__next__ = run_and_tell, next_or_raise
EpochIterator.run_pipeline, EpochIterator.close = run_after_copy, close_and_empty
Loader.compiled = False              # of the class: has a batch of this loader been made?
Compiler.set_num_threads = classmethod(set_num_threads)
OSCacheManager.compile_reader = compile_reader
quasi_random.generate_order_inner = keep_compiled()(quasi_random.generate_order_inner.py_func)
