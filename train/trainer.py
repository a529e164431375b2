"""Training and validation in one process of a run. Used by train_imagenet.py."""
import math
import resource
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import checkpoint
import launch
import schedules
import torch
from epoch_log import Stopwatch, append_events, append_log, format_table, named
from loaders import companion, normalise, pixel_statistics
from recipe import make_criterion, make_ema, make_mixing, make_model, make_optimizer, train_mode
from torch import nn
from tqdm import tqdm

from mrl_files import InputError, describe_error, gather, rank, read_json, world
from mrl_models import autocast, classify_in_float32, compute_logits, count, preparation, similar_sizes

SKIPS = 26                           # steps in a row that fp16 may skip: a healthy run skips a few at its beginning
LEAST_SCALE = 2.0 ** (16 - SKIPS)    # where the loss scale, 2**16 at first, is after so many


class Trainer:
    """What one process holds during a run, and the steps it takes."""

    def __init__(self, device, settings, spec, folder):
        self.device, self.settings, self.spec, self.folder = device, settings, spec, folder
        torch.manual_seed(settings.training.seed)
        torch.backends.cudnn.benchmark = True
        self.model = make_model(settings, spec, self.device)
        self.mix = make_mixing(settings.training, spec["num_classes"])
        self.criterion = make_criterion(settings).to(self.device)
        self.optimizer = make_optimizer(self.model, settings.training, fused=self.device.type == "cuda")
        precision = settings.training.precision or ("fp16" if self.device.type == "cuda" else "fp32")
        self.autocast = autocast(self.device, precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.models = {"": self.model}      # what is validated, and saved at the end
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}      # of a checkpoint
        if settings.training.ema and not settings.training.eval_only:
            self.parts["ema"] = make_ema(self.model, self.optimizer, settings.training.ema)
            self.models["ema_"] = self.parts["ema"].module
        for model in self.models.values():
            classify_in_float32(model)
        _, _, mean, std = preparation(spec)
        self.mean, self.std = pixel_statistics(self.device, mean, std)
        self.epoch, self.done, self.before, self.began = 0, 0, 0.0, time.time()      # done: batches of the epoch
        self.losses = torch.zeros(len(spec["nesting_list"]), device=self.device)
        if settings.training.compile:
            torch._dynamo.config.cache_size_limit = 64      # a graph for each resolution and each size of a batch
            self.model.compile(dynamic=False)
        devices = [self.device] if self.device.type == "cuda" else None
        self.parallel = self.model if world() == 1 else nn.parallel.DistributedDataParallel(
            self.model, devices, gradient_as_bucket_view=True)
        torch.manual_seed(settings.training.seed + 1 + rank())      # dropout differs between processes

    # ---- training

    def train_step(self, images, labels, rate, share=1, last=True):
        """A batch as FFCV gives it -> losses [G]; nothing here waits for the device.

        `share` batches share an optimiser step, taken after the last of them: their gradients' mean.
        """
        images, labels = self.mix(normalise(images, self.mean, self.std), labels.flatten(), self.epoch, self.done)
        with nullcontext() if last or world() == 1 else self.parallel.no_sync():
            with self.autocast:
                losses = self.criterion.per_size(self.parallel(images), labels)
                loss = self.criterion.weighted_sum(losses) / share
            self.scaler.scale(loss).backward()
        if last:
            self.update_weights(rate)
        return losses.detach()

    def update_weights(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if limit := self.settings.training.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)      # the limit is of the gradient, not of the scaled one
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def train_epoch(self, loader, stop):
        """The rest of the current epoch -> (images/s, share of the time that the device waited for data).

        Both are counted from the first batch on: FFCV compiles its pipeline before it.
        """
        s, watch = self.settings, Stopwatch(self.device)
        accumulate = s.training.accumulate or 1
        steps = math.ceil(len(loader) / accumulate)
        rates = schedules.iteration_rates(self.epoch, steps, s.lr, s.training.epochs).tolist()
        loader.set_resolution(schedules.resolution(self.epoch, **vars(s.resolution)))
        train_mode(self.parallel)
        batches = loader.epoch(self.epoch, self.done)
        bar = self.bar(batches, f"epoch {self.epoch + 1}/{s.training.epochs}", total=len(loader), initial=self.done)
        for images, labels in bar:
            watch.start()
            step, share, last = schedules.find_step(self.done, len(loader), accumulate)
            self.losses += self.train_step(images, labels, rates[step], share, last)
            self.done += 1
            watch.stop()
            if s.logging.log_level == 2:
                bar.set_postfix(loss=f"{self.losses.sum().item() / self.done:.3f}", refresh=False)
            if last and (signum := stop.asked()) and self.done < len(loader):
                batches.close()
                self.save_and_stop(signum)
        seconds, waited = watch.summary()
        return len(watch.ends) * loader.batch_size * world() / seconds, waited / seconds

    def bar(self, batches, words, **more):
        """tqdm in the first process; where a job's log keeps every state of it, one every 30 seconds."""
        return tqdm(batches, words, disable=rank() > 0, leave=False,
                    mininterval=0.5 if sys.stderr.isatty() else 30, **more)

    def save_and_stop(self, signum):
        self.check_weights()
        self.save()
        if rank() == 0:
            print(f"stopped in epoch {self.epoch + 1} after {self.done} steps; go on with "
                  f"--training.resume={self.folder}", file=sys.stderr)
        launch.wait()      # wait until all is saved: the first to exit ends the others
        raise launch.StoppedTogether(128 + signum)

    def run(self, loader, val, stop):
        """The epochs that are left; then final_weights.pt."""
        while self.epoch < self.settings.training.epochs:
            self.one_epoch(loader, val, stop)
            if (signum := stop.asked()) and self.epoch < self.settings.training.epochs:
                self.save_and_stop(signum)
        if rank() == 0:
            for name, model in reversed(self.models.items()):      # final_weights.pt last: the run is finished
                checkpoint.save_weights(self.folder, model.state_dict(), name)
            weights = (self.folder / "final_weights.pt").absolute()
            print(f"final weights: {weights}\nnext: cd ../inference && python pytorch_inference.py "
                  f"--path {shlex.quote(str(weights))} --dataset V1{describe_images(self.settings)}")

    def one_epoch(self, loader, val, stop):
        """Train, validate where asked for, and leave a line in the log and a checkpoint."""
        start = time.time()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speed, waiting = self.train_epoch(loader, stop)
        self.check_weights()
        waiting = gather(waiting)
        record = {"epoch": self.epoch, "train_time": time.time() - start, "images_per_second": speed,
                  "waiting_for_data": max(waiting), "waiting_most": waiting.index(max(waiting)),
                  "resolution": loader.resolution,
                  "current_lr": self.optimizer.param_groups[0]["lr"], **self.train_losses(len(loader))}
        if self.settings.logging.log_level or self.epoch + 1 == self.settings.training.epochs:
            record |= self.validate(val)
        self.finish_epoch(record)

    def check_weights(self):
        """A run that has diverged ends here, before it is saved over the last checkpoint that was of use.

        All processes decide together: each has running statistics of its own, and one that ended alone would leave the
        others waiting.
        """
        found = [what for what in gather(self.diverged()) if what]
        if found and rank() == 0:
            raise InputError(f"epoch {self.epoch + 1}: {found[0]}. Begin anew with a lower --lr.lr or "
                             f"with --training.precision=bf16; the last checkpoint stays in {self.folder}")
        if found:
            launch.wait()      # the first process reports the error for all

    def diverged(self):
        """-> what is wrong in this process, or None. In fp16 GradScaler skips each step whose gradient is not finite:
        the weights stay as they were, while running statistics become NaN and the scale shrinks with each skip."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            return "weights are NaN or infinite"
        if not all(b.isfinite().all() for b in self.model.buffers()):
            return "running statistics are NaN or infinite"
        if self.scaler.get_scale() < LEAST_SCALE:
            return f"the gradients of the last {SKIPS} steps and more are NaN or infinite"
        return None

    def train_losses(self, steps):
        """-> the epoch's mean loss, and that of each size; over all processes."""
        losses = launch.total(self.losses / (steps * world()))
        sizes = named(self.spec, "train_loss", losses)
        return {**sizes, "train_loss": self.criterion.weighted_sum(losses).item()}

    def finish_epoch(self, record):
        record = {"timestamp": time.time(), "relative_time": self.elapsed(), **record,
                  "peak_memory_mb": max(gather(self.peak_memory()))}
        self.epoch, self.done = self.epoch + 1, 0
        self.losses.zero_()
        if rank() == 0:
            append_log(self.folder, record)
            if self.settings.logging.tensorboard:
                append_events(self.folder, record)
            print(format_table(record, self.spec, self.settings.training.epochs), flush=True)
        self.save()

    def peak_memory(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    # ---- validation

    def validate(self, loader):
        """-> {top_1, top_5, val_loss (of each size), val_images, val_time}; of an average too: ema_top_1, ..."""
        start, record = time.time(), {}
        for name, model in self.models.items():
            record |= self.validate_one(model, loader, name)
        return {**record, "val_time": time.time() - start}

    def validate_one(self, model, loader, name):
        """Every image once, over all processes -> accuracies as fractions, and losses."""
        launch.share_buffers(model)
        model.eval()
        sums = torch.zeros(3, len(self.spec["nesting_list"]), device=self.device, dtype=torch.float64)
        n = torch.zeros(1, device=self.device, dtype=torch.int64)
        tta = self.settings.validation.lr_tta
        # no_grad, not inference_mode: FFCV makes its tensors here, and its own thread writes into them
        with torch.no_grad(), self.autocast:
            for images, labels in self.bar(loader, "validation"):
                logits = compute_logits(model, normalise(images, self.mean, self.std), tta)
                sums += count(logits / 2 if tta else logits, labels.flatten())      # the loss of the mean
                n += len(images)
        top_1, top_5, loss = launch.total(sums) / launch.total(n)
        return {**named(self.spec, f"{name}top_1", top_1), **named(self.spec, f"{name}top_5", top_5),
                **named(self.spec, f"{name}val_loss", loss), "val_images": n.item()}

    # ---- state

    def save(self):
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        rngs = gather(rng)
        losses = launch.total(self.losses.clone())
        if rank() == 0:
            checkpoint.save(self.folder, {
                **{name: part.state_dict() for name, part in self.parts.items()},
                "rng": rngs, "losses": losses / world(),
                "epoch": self.epoch, "step": self.done, "elapsed": self.elapsed()})

    def restore(self, state):
        try:
            self.load(state)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / checkpoint.CURRENT}: is not of this run "
                             f"({describe_error(error)})") from None

    def load(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        rng = state["rng"][rank()]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
        self.losses.copy_(state["losses"])
        self.epoch, self.done, self.before = state["epoch"], state["step"], state["elapsed"]

    def elapsed(self):
        return self.before + time.time() - self.began


def describe_images(settings):
    """-> what tells pytorch_inference.py where V1 is, if training validated on a folder called val, or an .ffcv file of
    one; and how large its images are, if they are not about as large as ImageNet's."""
    val, pixels = Path(settings.data.val_dataset).absolute(), settings.validation.resolution
    folder = val if val.is_dir() else Path((read_json(companion(val)) or {}).get("folder", ""))
    there = f" --data_root {shlex.quote(str(folder.parent))}" if folder.is_dir() and folder.name == "val" else ""
    return there if similar_sizes(pixels, 224) else f"{there} --crop {pixels}"
