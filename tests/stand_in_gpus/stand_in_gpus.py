"""Imported, it makes PyTorch and FFCV believe in STAND_IN_GPUS GPUs, on which the CPU computes.

Each stand-in asserts what the real thing demands. STAND_IN_NOTES (a file) gets a line for what tests look at: which
thread of which process uses which GPU, scalers, groups, graphs. What cannot be shown so: NCCL, CUDA's kernels and their
precision, the order of streams (test_late_streams.py), memory, a tensor that is on the other device
(test_fake_cuda.py).
"""
import functools
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

GPUS = int(os.environ["STAND_IN_GPUS"])
TORCH = str(Path(torch.__file__).parent)
thread = threading.local()


def note(*words):
    """A line: rank, kind of thread (_MainThread, FFCV's EpochIterator, Thread: that which pins batches), words."""
    kind = type(threading.current_thread()).__name__
    with open(os.environ["STAND_IN_NOTES"], "a") as file:
        file.write(f"rank{os.environ.get('LOCAL_RANK', 0)} {kind} {' '.join(map(str, words))}\n")


def current_device():
    return getattr(thread, "device", 0)


def set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index
    assert 0 <= index < GPUS, f"CUDA error: invalid device ordinal {device}"
    thread.device = index
    note("uses", index)


def on_cpu(device):
    """cuda:1 -> cpu; what is no GPU stays. A GPU named without its number is the thread's current one."""
    if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
        index = torch.device(device).index
        index = current_device() if index is None else index
        if index >= GPUS:
            raise RuntimeError("CUDA error: invalid device ordinal")
        note("uses", index)
        return torch.device("cpu")
    return device


# ---- torch.cuda and torch.accelerator

class Stream:
    def __init__(self, device=None, **_):
        self.device = torch.device("cuda", current_device())
        note("uses", self.device.index)

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Event:
    def __init__(self, enable_timing=False, **_):
        self.timing, self.time = enable_timing, None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time is not None, "the event was not recorded"

    wait = query = synchronize

    def elapsed_time(self, end):
        assert self.timing and end.timing
        return 1e3 * (end.time - self.time)


def is_available():
    """For the project and FFCV; PyTorch's own modules (its compiler) are told the truth."""
    return not sys._getframe(1).f_code.co_filename.startswith(TORCH)


def current_stream(device=None):
    if not hasattr(thread, "stream"):
        thread.stream = Stream()
    return thread.stream


@contextmanager
def stream(used):
    note("uses", current_device())
    before, thread.stream = current_stream(), used
    yield
    thread.stream = before


rng = {"state": torch.arange(16, dtype=torch.uint8)}


def set_rng_state(state, *_):
    assert state.dtype == torch.uint8 and state.device.type == "cpu" and len(state) == 16
    rng["state"] = state
    note("random state restored")


for name, stand_in in {"is_available": is_available, "device_count": lambda: GPUS, "current_device": current_device,
                       "set_device": set_device, "Stream": Stream, "Event": Event, "current_stream": current_stream,
                       "stream": stream, "synchronize": lambda *_: None, "get_rng_state": lambda *_: rng["state"],
                       "set_rng_state": set_rng_state, "reset_peak_memory_stats": lambda *_: None,
                       "max_memory_allocated": lambda *_: 123 << 20,
                       "get_device_name": lambda *_: "a GPU's stand-in"}.items():
    setattr(torch.cuda, name, stand_in)


def for_data_loaders(stand_in, real):
    """DataLoader's thread for pinned memory asks torch.accelerator; so does the compiler, which is told the truth."""
    def asked(*args, **given):
        its = sys._getframe(1).f_code.co_filename.startswith(f"{TORCH}/utils/data")
        return (stand_in if its else real)(*args, **given)
    return asked


for name, stand_in in {"is_available": lambda: True, "current_accelerator": lambda **_: torch.device("cuda"),
                       "current_device_index": current_device, "set_device_index": set_device}.items():
    setattr(torch.accelerator, name, for_data_loaders(stand_in, getattr(torch.accelerator, name)))


# ---- tensors

def takes_device(make):
    @functools.wraps(make)
    def made(*args, **given):
        if "device" in given:
            given["device"] = on_cpu(given["device"])
        return make(*args, **given)
    return made


_device_constructors()      # what `with torch.device` looks for, listed while it is still itself
for name in ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange"):
    setattr(torch, name, takes_device(getattr(torch, name)))
to = takes_device(torch.Tensor.to)
torch.Tensor.to = lambda self, *args, **given: to(self, *map(on_cpu, args), **given)
torch.Tensor.pin_memory = lambda self, *_: self.clone()


# ---- half precision, several processes, the compiler

def autocast(init):
    def begun(self, device_type, dtype=None, enabled=True, cache_enabled=None):      # the compiler reads these names
        half = device_type == "cuda" and dtype == torch.float16
        if device_type == "cuda" and enabled:
            note("autocast", dtype)
        init(self, "cpu" if device_type == "cuda" else device_type, torch.bfloat16 if half else dtype, enabled,
             cache_enabled)
    return begun


def scaler(init):
    def begun(self, device="cuda", **given):
        assert device == "cuda"
        init(self, "cpu", **given)
    return begun


def scaled_step(step):
    def stepped(self, optimizer):
        note("scaled step" if self.is_enabled() else "step")
        return step(self, optimizer)
    return stepped


def data_parallel(init):
    def begun(self, module, device_ids=None, **given):
        assert [torch.device(device).index for device in device_ids] == [current_device()]
        note("data parallel", current_device())
        init(self, module, **given)
    return begun


for kind, stand_in in ((torch.amp.autocast_mode.autocast, autocast), (torch.amp.GradScaler, scaler),
                       (torch.nn.parallel.DistributedDataParallel, data_parallel)):
    kind.__init__ = stand_in(kind.__init__)
torch.amp.GradScaler.step = scaled_step(torch.amp.GradScaler.step)
init_process_group, compile_module = dist.init_process_group, torch.nn.Module.compile


def init_group(backend, **given):
    """Each command has its own place in torchrun's store: of several in one process, the next would find the addresses
    of the first."""
    note("group", backend)
    if "store" not in given:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, *_ = next(dist.rendezvous("env://", rank, size))
        given |= {"store": dist.PrefixStore(os.environ["STAND_IN_NOTES"], store), "rank": rank, "world_size": size}
    return init_process_group("gloo" if backend == "cpu:gloo,cuda:nccl" else backend, **given)


def compile_graph(graph, inputs):
    """As the real compiler, but without C++ to compile."""
    note("graph")
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


dist.init_process_group = init_group
torch.nn.Module.compile = functools.partialmethod(compile_module, backend=compile_graph)
