"""Learning rate and image resolution as pure functions of the epoch. Used by trainer.py."""
import math

import numpy as np

from mrl_files import InputError

PEAK = 2        # epoch of the highest rate where none is given: the original's


def check_schedules(settings):
    """InputError for schedules that cannot be followed."""
    ramp, peak, epochs = settings.resolution, settings.lr.lr_peak_epoch, settings.training.epochs
    if ramp.start_ramp > ramp.end_ramp:
        raise InputError(f"--resolution.start_ramp={ramp.start_ramp}: is after --resolution.end_ramp={ramp.end_ramp}; "
                         "give an earlier one, or a later end")
    # The default peak may lie after the end: the original's commands with --training.epochs=1 still run.
    if settings.lr.lr_schedule_type == "cyclic" and peak > max(epochs, PEAK):
        raise InputError(f"--lr.lr_peak_epoch={peak}: is after the last of --training.epochs={epochs}, and the rate "
                         f"would never fall; give 0 to {epochs}")
    check_warmup(settings.lr, epochs)


def check_warmup(lr, epochs):
    if lr.warmup_epochs and lr.lr_schedule_type != "cosine":
        raise InputError(f"--lr.warmup_epochs={lr.warmup_epochs}: is of --lr.lr_schedule_type=cosine; of the cyclic "
                         "schedule, --lr.lr_peak_epoch")
    if lr.warmup_epochs and lr.warmup_epochs >= epochs:
        raise InputError(f"--lr.warmup_epochs={lr.warmup_epochs}: leaves no epoch of --training.epochs={epochs} after "
                         f"it; give 0 to {epochs - 1}")


def cyclic(epoch, lr, peak_epoch, epochs):
    """Triangle: 1e-4 * lr at epoch 0, lr at the peak, 0 at the end. A peak after the end is not reached."""
    return float(np.interp(epoch, [0, peak_epoch, max(peak_epoch, epochs)], [1e-4 * lr, lr, 0]))


def cosine(epoch, lr, warmup, epochs):
    """A line from 1e-4 * lr at epoch 0 to lr after the warm-up, then half a cosine down to 0 at the end."""
    if epoch < warmup:
        return float(np.interp(epoch, [0, warmup], [1e-4 * lr, lr]))
    return lr * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


def step(epoch, lr, ratio, length, epochs):
    """Multiplied by `ratio` every `length` epochs; 0 at the end."""
    return 0.0 if epoch >= epochs else lr * ratio ** (epoch // length)


def learning_rate(epoch, settings, epochs):
    """The rate at the start of an epoch; `settings` is the lr section of train_imagenet.py."""
    if settings.lr_schedule_type == "cyclic":
        return cyclic(epoch, settings.lr, settings.lr_peak_epoch, epochs)
    if settings.lr_schedule_type == "cosine":
        return cosine(epoch, settings.lr, settings.warmup_epochs or 0, epochs)
    if settings.lr_schedule_type == "step":
        return step(epoch, settings.lr, settings.step_ratio, settings.step_length, epochs)
    return settings.lr


def iteration_rates(epoch, iterations, settings, epochs):
    """-> [iterations] rates of one epoch's optimiser steps: linear from its rate to the next epoch's, which is not
    reached."""
    ends = [learning_rate(e, settings, epochs) for e in (epoch, epoch + 1)]
    return np.interp(np.arange(iterations), [0, iterations], ends)


def find_step(batch, batches, accumulate):
    """Which optimiser step a batch belongs to -> (step of the epoch, how many batches share it, is it their last?).

    `accumulate` batches to a step; where an epoch's batches do not divide by it, the last step has fewer.
    """
    number = batch // accumulate
    end = min((number + 1) * accumulate, batches)
    return number, end - number * accumulate, batch + 1 == end


def resolution(epoch, min_res, max_res, start_ramp, end_ramp):
    """Pixels a side: min_res up to start_ramp, max_res from end_ramp, between them a line in steps of 32."""
    if epoch <= start_ramp:
        return min_res
    if epoch >= end_ramp:
        return max_res
    return max(32, 32 * round(float(np.interp(epoch, [start_ramp, end_ramp], [min_res, max_res])) / 32))
