"""How long the steps of an epoch took, and how long the device waited between them. Used by trainer.py."""
import time

import torch


class Stopwatch:
    """Moments on the device's own time line: CUDA events (no waiting for the GPU) or the host's clock."""

    def __init__(self, device):
        self.cuda, self.starts, self.ends = device.type == "cuda", [], []

    def start(self):
        self.starts.append(self.now())

    def stop(self):
        self.ends.append(self.now())

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def summary(self):
        """-> (seconds from the first start to the last stop, those of them between steps); waits for the GPU."""
        return self.seconds(self.starts[0], self.ends[-1]), sum(map(self.seconds, self.ends[:-1], self.starts[1:]))

    def seconds(self, start, end):
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
