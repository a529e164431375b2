"""Learning rate and resolution by epoch, against the original's (tests/golden)."""
from types import SimpleNamespace

import numpy as np
import pytest
import schedules

from mrl_files import InputError


def lr(**changes):
    return SimpleNamespace(**{"lr": 0.425, "lr_schedule_type": "cyclic", "lr_peak_epoch": 2, "step_ratio": 0.1,
                              "step_length": 30, "warmup_epochs": None, **changes})


def test_rates_equal_the_original(golden):
    numbers, _ = golden("model")
    cyclic = [schedules.learning_rate(e, lr(), 40) for e in range(41)]
    np.testing.assert_allclose(cyclic, numbers["lr_cyclic_epochs40_lr0.425_peak2"], rtol=1e-15)
    step = [schedules.learning_rate(e, lr(lr_schedule_type="step"), 40) for e in range(41)]
    np.testing.assert_allclose(step, numbers["lr_step_epochs40_lr0.425_ratio0.1_length30"], rtol=1e-15)
    assert schedules.learning_rate(7, lr(lr_schedule_type="constant"), 40) == 0.425


def test_cosine():
    rates = [schedules.learning_rate(e, lr(lr=1.0, lr_schedule_type="cosine", warmup_epochs=2), 6) for e in range(7)]
    root = 0.5 ** 0.5
    np.testing.assert_allclose(rates, [1e-4, 0.50005, 1, (1 + root) / 2, 0.5, (1 - root) / 2, 0], atol=1e-15)
    assert schedules.learning_rate(0, lr(lr=1.0, lr_schedule_type="cosine"), 6) == 1


def test_batches_that_share_a_step():
    assert [schedules.find_step(batch, 7, 3) for batch in range(7)] == [
        (0, 3, False), (0, 3, False), (0, 3, True), (1, 3, False), (1, 3, False), (1, 3, True), (2, 1, True)]
    assert [schedules.find_step(batch, 2, 1) for batch in range(2)] == [(0, 1, True), (1, 1, True)]


def test_rates_within_an_epoch_run_to_the_next_epochs():
    rates = schedules.iteration_rates(2, 4, lr(lr=1.0), 6)      # 1 at epoch 2, 0.75 at epoch 3
    np.testing.assert_allclose(rates, [1, 0.9375, 0.875, 0.8125])


def test_a_peak_after_the_end_is_on_its_way_up_at_the_end():
    rates = [schedules.learning_rate(e, lr(lr=1.0, lr_peak_epoch=4), 2) for e in range(3)]
    np.testing.assert_allclose(rates, [1e-4, 1e-4 + 0.9999 / 4, 1e-4 + 0.9999 / 2])
    np.testing.assert_allclose(schedules.iteration_rates(0, 2, lr(lr=1.0), 1), [1e-4, 1e-4 + 0.9999 / 4])


def settings(start_ramp=0, end_ramp=0, epochs=4, **changes):
    return SimpleNamespace(resolution=SimpleNamespace(start_ramp=start_ramp, end_ramp=end_ramp), lr=lr(**changes),
                           training=SimpleNamespace(epochs=epochs))


@pytest.mark.parametrize("changes", [{}, {"epochs": 1}, {"lr_peak_epoch": 0}, {"lr_peak_epoch": 4},
                                     {"start_ramp": 29, "end_ramp": 34, "epochs": 40},
                                     {"lr_peak_epoch": 5, "lr_schedule_type": "step"},
                                     {"lr_schedule_type": "cosine", "warmup_epochs": 3}], ids=str)
def test_schedules_that_can_be_followed(changes):
    schedules.check_schedules(settings(**changes))


@pytest.mark.parametrize("changes, says", [
    ({"lr_peak_epoch": 5}, "--lr.lr_peak_epoch=5: .*--training.epochs=4,.* give 0 to 4"),
    ({"lr_peak_epoch": 3, "epochs": 1}, "--lr.lr_peak_epoch=3"),
    ({"warmup_epochs": 1}, "--lr.warmup_epochs=1: is of --lr.lr_schedule_type=cosine"),
    ({"lr_schedule_type": "cosine", "warmup_epochs": 4}, "--lr.warmup_epochs=4: leaves no epoch .* give 0 to 3"),
    ({"start_ramp": 2, "end_ramp": 1}, "--resolution.start_ramp=2: is after --resolution.end_ramp=1")], ids=str)
def test_schedules_that_cannot(changes, says):
    with pytest.raises(InputError, match=says):
        schedules.check_schedules(settings(**changes))


def test_resolutions_equal_the_original(golden):
    numbers, _ = golden("model")
    ours = [schedules.resolution(e, 160, 192, 29, 34) for e in range(40)]
    assert ours == numbers["resolution_160_192_ramp29_34"]
    assert schedules.resolution(3, 160, 160, 0, 0) == 160
