"""Training and validation in one process of a run. Used by train_imagenet.py."""
import resource
import sys
import time

import checkpoint
import launch
import schedules
import torch
import torch.nn.functional as F
from loaders import normalise
from recipe import make_criterion, make_model, make_optimizer, train_mode
from torch import nn
from tqdm import tqdm

from MRL import InputError, reason, replacing, stack_logits

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)      # ImageNet's, of pixels 0..255


class Trainer:
    """What one process holds during a run, and the steps it takes."""

    def __init__(self, process, settings, spec, folder):
        self.process, self.settings, self.spec, self.folder = process, settings, spec, folder
        self.device = process.device
        torch.manual_seed(settings.training.seed)
        torch.backends.cudnn.benchmark = True
        self.model = make_model(settings, spec, self.device)
        self.criterion = make_criterion(settings).to(self.device)
        self.optimizer = make_optimizer(self.model, settings.training)
        precision = settings.training.precision or ("fp16" if self.device.type == "cuda" else "fp32")
        self.autocast = torch.autocast(self.device.type, {"fp16": torch.float16}.get(precision, torch.bfloat16),
                                       enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (MEAN, STD))
        self.epoch, self.step, self.before, self.began = 0, 0, 0.0, time.time()
        self.losses = torch.zeros(len(spec["nesting_list"]), device=self.device)
        if settings.training.compile:
            self.model.compile(dynamic=False)       # a new graph at each resolution; three of them in 40 epochs
        ids = [self.device] if self.device.type == "cuda" else None
        self.parallel = self.model if process.alone else nn.parallel.DistributedDataParallel(self.model, ids)
        torch.manual_seed(settings.training.seed + 1 + process.rank)      # dropout differs between processes

    # ---- state

    def save(self):
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        rngs = launch.gather(self.process, rng)
        (losses,) = launch.total(self.process, self.losses.clone())
        if self.process.first:
            checkpoint.save(self.folder, {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "rng": rngs, "losses": losses / self.process.world_size,
                "epoch": self.epoch, "step": self.step, "elapsed": self.elapsed()})

    def restore(self, state):
        try:
            self.load(state)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / checkpoint.CURRENT}: is not of this run "
                             f"({reason(error)})") from None

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        rng = state["rng"][self.process.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
        self.losses.copy_(state["losses"])
        self.epoch, self.step, self.before = state["epoch"], state["step"], state["elapsed"]

    def elapsed(self):
        return self.before + time.time() - self.began

    # ---- training

    def train_step(self, images, labels, rate):
        """One optimiser step on a batch as FFCV gives it -> losses [G]; nothing here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            output = self.parallel(normalise(images, self.mean, self.std))
            losses = self.criterion.per_size(output, labels.flatten())
            loss = self.criterion.weighted_sum(losses)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses.detach()

    def train_epoch(self, loader, stop):
        """The rest of the current epoch -> (images/s, share of the time that the device waited for data).

        Both are counted from the first batch on: FFCV compiles its pipeline before it.
        """
        s, now = self.settings, launch.Clock(self.device).now
        rates = schedules.iteration_rates(self.epoch, len(loader), s.lr, s.training.epochs).tolist()
        loader.set_resolution(schedules.resolution(self.epoch, **vars(s.resolution)))
        train_mode(self.parallel)
        batches = loader.epoch(self.epoch, self.step)
        starts, ends = [], []
        bar = tqdm(batches, f"epoch {self.epoch + 1}/{s.training.epochs}", len(loader), initial=self.step,
                   disable=not self.process.first, leave=False, mininterval=0.5)
        for images, labels in bar:
            starts.append(now())
            self.losses += self.train_step(images, labels, rates[self.step])
            self.step += 1
            ends.append(now())
            if s.logging.log_level == 2:
                bar.set_postfix(loss=f"{self.losses.sum().item() / self.step:.3f}")
            if (signum := stop.asked()) and self.step < len(loader):
                batches.close()
                self.stopped(signum)
        seconds = launch.Clock(self.device).seconds
        total, waited = seconds(starts[0], ends[-1]), sum(map(seconds, ends[:-1], starts[1:]))
        return len(ends) * loader.batch_size * self.process.world_size / total, waited / total

    def stopped(self, signum):
        self.save()
        if self.process.first:
            print(f"stopped in epoch {self.epoch + 1} after {self.step} steps; go on with "
                  f"--training.resume={self.folder}", file=sys.stderr)
        sys.exit(128 + signum)

    def run(self, loader, val, stop):
        epochs = self.settings.training.epochs
        while self.epoch < epochs:
            start = time.time()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            speed, waiting = self.train_epoch(loader, stop)
            record = {"epoch": self.epoch, "train_time": time.time() - start, "images_per_second": speed,
                      "waiting_for_data": waiting, "resolution": loader.pipeline_specs["image"].decoder.output_size[0],
                      "current_lr": self.optimizer.param_groups[0]["lr"], **self.train_losses(len(loader))}
            if self.settings.logging.log_level or self.epoch + 1 == epochs:
                record |= self.validate(val)
            self.finish_epoch(record)
            if (signum := stop.asked()) and self.epoch < epochs:
                self.stopped(signum)
        if self.process.first:
            with replacing(self.folder / "final_weights.pt") as path:
                torch.save(self.model.state_dict(), path)
            print(f"final weights: {self.folder / 'final_weights.pt'}")

    def train_losses(self, steps):
        """-> the epoch's mean loss, and that of each size; over all processes."""
        (losses,) = launch.total(self.process, self.losses / (steps * self.process.world_size))
        sizes = named(self.spec, "train_loss", losses)
        return {**sizes, "train_loss": self.criterion.weighted_sum(losses).item()}

    def finish_epoch(self, record):
        record = {"timestamp": time.time(), "relative_time": self.elapsed(), **record,
                  "peak_memory_mb": self.peak_memory()}
        self.epoch, self.step = self.epoch + 1, 0
        self.losses.zero_()
        if self.process.first:
            checkpoint.append_log(self.folder, record)
            print(table(record, self.spec, self.settings), flush=True)
        self.save()

    def peak_memory(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    # ---- validation

    def validate(self, loader):
        """Every image once, over all processes -> {top_1, top_5, val_loss (of each size), val_time}; fractions."""
        start = time.time()
        launch.share_buffers(self.process, self.model)
        self.model.eval()
        counts = torch.zeros(4, len(self.spec["nesting_list"]), device=self.device, dtype=torch.float64)
        bar = tqdm(loader, "validation", disable=not self.process.first, leave=False, mininterval=0.5)
        with torch.inference_mode(), self.autocast:
            for images, labels in bar:
                counts += self.count(normalise(images, self.mean, self.std), labels.flatten())
        launch.total(self.process, counts)
        top_1, top_5, loss, images = counts
        return {**named(self.spec, "top_1", top_1 / images), **named(self.spec, "top_5", top_5 / images),
                **named(self.spec, "val_loss", loss / images), "val_images": int(images[0]),
                "val_time": time.time() - start}

    def count(self, images, labels):
        """-> [4, G]: right at first, right among the first five, summed loss (no label smoothing), images."""
        logits = stack_logits(self.model(images))
        if self.settings.validation.lr_tta:
            logits = (logits + stack_logits(self.model(images.flip(-1)))) / 2
        sizes, n, classes = logits.shape
        hits = logits.topk(min(5, classes), dim=-1).indices == labels[:, None]
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.repeat(sizes), reduction="none").view(sizes, n)
        images = torch.full((sizes,), n, device=losses.device)
        return torch.stack([hits[..., 0].sum(1), hits.any(-1).sum(1), losses.sum(1), images])


def named(spec, name, values):
    """One entry a size: top_1_8, top_1_16 ...; a fixed-feature model has the one entry top_1."""
    if spec["head"].startswith("ff"):
        return {name: values[0].item()}
    return {f"{name}_{size}": value for size, value in zip(spec["nesting_list"], values.tolist(), strict=True)}


def table(record, spec, settings):
    """The end of an epoch, for people: one line of facts, then a row a size."""
    lines = [f"epoch {record['epoch'] + 1}/{settings.training.epochs}  lr {record['current_lr']:.4f}  "
             f"{record['resolution']} px  {record['images_per_second']:.0f} images/s  "
             f"waiting for data {record['waiting_for_data']:.0%}  {record['train_time']:.1f} s  "
             f"peak {record['peak_memory_mb']:.0f} MB  loss {record['train_loss']:.4f}"]
    if record["waiting_for_data"] > 0.2:
        lines.append("  hint: the device waits for data; more --data.num_workers, more CPU cores, "
                     "or a file with fewer JPEGs (write_imagenet.sh) would help")
    if "val_images" in record:
        lines.append("    size   top-1 %   top-5 %  val loss  train loss")
        for size in spec["nesting_list"]:
            end = "" if spec["head"].startswith("ff") else f"_{size}"
            top_1, top_5, val, train = (record[f"{k}{end}"] for k in ("top_1", "top_5", "val_loss", "train_loss"))
            lines.append(f"  {size:6d} {100 * top_1:9.2f} {100 * top_5:9.2f} {val:9.4f} {train:11.4f}")
    return "\n".join(lines)
