"""An epoch's figures: how long its steps took, their names in the log, the printed table, and the log itself.

The log of a run folder has one JSON object a line. Used by trainer.py and train_imagenet.py.
"""
import json
import math
import re
import time

import torch

from mrl_files import replacing

COLUMNS = {"top_1": "   top-1 %", "top_5": "   top-5 %", "val_loss": "  val loss", "train_loss": "  train loss",
           "ema_top_1": "  ema top-1 %"}


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


def endings(spec):
    """-> what a name has at its end for each size: _8, _16 ...; nothing for a fixed-feature model, which has one."""
    return [""] if spec["head"].startswith("ff") else [f"_{size}" for size in spec["nesting_list"]]


def named(spec, name, values):
    """values [G] -> one entry a size: top_1_8, top_1_16 ..., or top_1."""
    return {f"{name}{end}": value for end, value in zip(endings(spec), values.tolist(), strict=True)}


def format_table(record, spec, epochs):
    """The end of an epoch: one line of facts, then a row a size, accuracies in per cent."""
    lines = [f"epoch {record['epoch'] + 1}/{epochs}  lr {record['current_lr']:.4f}  "
             f"{record['resolution']} px  {record['images_per_second']:.0f} images/s  "
             f"waiting for data {record['waiting_for_data']:.0%}  {record['train_time']:.1f} s  "
             f"peak {record['peak_memory_mb']:.0f} MB  loss {record['train_loss']:.4f}"]
    if record["waiting_for_data"] > 0.2:
        lines.append(f"  hint: the device of process {record['waiting_most']} waits for data; more "
                     "--data.num_workers, more CPU cores, or a file with fewer JPEGs (write_imagenet.sh) would help")
    return "\n".join(lines + format_sizes(record, spec) if "val_images" in record else lines)


def format_sizes(record, spec):
    """-> lines: a row a size, accuracies in per cent, of the COLUMNS that the record has."""
    there = {key: heading for key, heading in COLUMNS.items() if f"{key}{endings(spec)[0]}" in record}
    rows = [f"  {size:6d}" + "".join(
        f" {100 * record[key + end]:{len(heading) - 1}.2f}" if "%" in heading else
        f" {record[key + end]:{len(heading) - 1}.4f}"
        for key, heading in there.items()) for size, end in zip(spec["nesting_list"], endings(spec), strict=True)]
    return ["    size" + "".join(there.values()), *rows]


def append_log(folder, record):
    """A line of JSON, which knows no NaN: null."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with open(folder / "log", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def append_events(folder, record):
    """The same for TensorBoard: top_1/8, top_1/16 ... in one chart. What an earlier attempt wrote of this epoch and of
    later ones, TensorBoard then forgets."""
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(folder / "tensorboard", purge_step=record["epoch"]) as events:
        for key, value in record.items():
            tag = re.sub(r"^((?:ema_)?(?:top_1|top_5|val_loss)|train_loss)_(\d+)$", r"\1/\2", key)
            events.add_scalar(tag, value, record["epoch"], record["timestamp"])


def read_log(folder):
    """-> list of the log's records; a line that a killed run left unfinished is dropped."""
    records = []
    for line in (folder / "log").read_text(encoding="utf-8").splitlines() if (folder / "log").exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def forget_after(folder, epoch):
    """Drop the log's records of epochs that will run again."""
    kept = [record for record in read_log(folder) if record["epoch"] < epoch]
    with replacing(folder / "log") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
