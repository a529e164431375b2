"""FFCV's loader on streams whose copies come late: the batches are whole with the repair of ffcv_repairs.py, and not
without it. A GPU's work is put into queues here, and done as late as its order allows, or earlier at random."""
import random
import threading
from collections import deque
from contextlib import contextmanager

import ffcv.loader.epoch_iterator as ffcv_iterator
import ffcv_repairs
import pytest
import torch
from ffcv.transforms import ToDevice
from loaders import train_loader

SLOTS = 5                     # batches that an iterator of FFCV has memory for
lock = threading.RLock()      # FFCV decodes in a thread of its own


class Stream:
    """A queue of work. Each piece says what must be done before it: (stream, how many of its pieces)."""

    made, rng = [], random.Random(0)

    def __init__(self):
        self.device, self.queue, self.put_in, self.done = torch.device("cuda", 0), deque(), 0, 0
        Stream.made.append(self)

    def put(self, work, before=None):
        with lock:
            self.queue.append((work, before))
            self.put_in += 1
            if Stream.rng.random() < 0.02:      # some of it comes early
                stream = Stream.rng.choice(Stream.made)
                stream.run(stream.done + 1)

    def run(self, upto):
        """Do the first `upto` pieces, and before each what it waits for."""
        while self.done < min(upto, self.put_in):
            work, before = self.queue.popleft()
            if before:
                before[0].run(before[1])
            work()
            self.done += 1

    def synchronize(self):
        with lock:
            self.run(self.put_in)

    def wait_stream(self, other):
        self.put(lambda: None, (other, other.put_in))


class Event:
    def record(self, stream):
        with lock:
            self.before = stream, stream.put_in

    def wait(self):
        current().put(lambda: None, self.before)


here = threading.local()


def current(*_):
    return getattr(here, "stream", Stream.made[0])


@contextmanager
def entered(stream):
    here.stream = stream
    yield
    here.stream = Stream.made[0]


def copy_late(self):
    def to_device(pinned, target):
        target = target[:len(pinned)]
        current().put(lambda: target.copy_(pinned))
        return target
    return to_device


@pytest.fixture
def late_gpu(monkeypatch):
    for module in (ffcv_iterator, ffcv_repairs):
        monkeypatch.setattr(module, "IS_CUDA", True)
    monkeypatch.setattr(Stream, "made", [])
    Stream()
    for name, stand_in in {"Stream": Stream, "Event": Event, "stream": entered, "current_stream": current,
                           "set_device": lambda _: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    empty, memory = torch.empty, {}

    def allocate(*shape, device=None, **given):
        """PyTorch gives an iterator's GPU memory to the next one at once, though work that reads it may still wait."""
        if device is None:
            return empty(*shape, **given)
        slots = memory.setdefault(shape, deque(empty(*shape, **given) for _ in range(SLOTS)))
        slots.rotate()
        return slots[0]

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(ToDevice, "generate_code", copy_late)


def read(file, device):
    """-> three epochs of batches; on a GPU training reads each of them when the GPU comes to it."""
    loader, found = train_loader(file, 2, 1, 1, 32, 0, device), []
    for epoch in range(3):
        for images, labels in loader.epoch(epoch):
            def look(images=images, labels=labels):
                found.append((images.sum().item(), images.float().std().item(), labels.sum().item()))
            look() if device == "cpu" else current().put(look)
    if device != "cpu":
        current().synchronize()
    return found


@pytest.mark.parametrize("repaired", [True, False])
def test_batches_are_whole(noise, late_gpu, monkeypatch, repaired):
    with monkeypatch.context() as patch:
        for module in (ffcv_iterator, ffcv_repairs):
            patch.setattr(module, "IS_CUDA", False)
        expected = read(noise(32) / "data.ffcv", "cpu")
    if not repaired:
        monkeypatch.setattr(ffcv_iterator.EpochIterator, "run_pipeline", ffcv_repairs.run_pipeline)
    wrong = sum(a != b for a, b in zip(expected, read(noise(32) / "data.ffcv", "cuda:0"), strict=True))
    assert len(expected) == 48
    assert wrong == 0 if repaired else wrong > 24, wrong
