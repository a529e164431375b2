"""Learning rate and resolution by epoch, against the original's (tests/golden)."""
from types import SimpleNamespace

import numpy as np
import schedules


def lr(**changes):
    return SimpleNamespace(**{"lr": 0.425, "lr_schedule_type": "cyclic", "lr_peak_epoch": 2, "step_ratio": 0.1,
                              "step_length": 30, **changes})


def test_rates_equal_the_original(golden):
    numbers, _ = golden("model")
    cyclic = [schedules.learning_rate(e, lr(), 40) for e in range(41)]
    np.testing.assert_allclose(cyclic, numbers["lr_cyclic_epochs40_lr0.425_peak2"], rtol=1e-15)
    step = [schedules.learning_rate(e, lr(lr_schedule_type="step"), 40) for e in range(41)]
    np.testing.assert_allclose(step, numbers["lr_step_epochs40_lr0.425_ratio0.1_length30"], rtol=1e-15)
    assert schedules.learning_rate(7, lr(lr_schedule_type="constant"), 40) == 0.425


def test_rates_within_an_epoch_run_to_the_next_epochs():
    rates = schedules.iteration_rates(2, 4, lr(lr=1.0), 6)      # 1 at epoch 2, 0.75 at epoch 3
    np.testing.assert_allclose(rates, [1, 0.9375, 0.875, 0.8125])


def test_resolutions_equal_the_original(golden):
    numbers, _ = golden("model")
    ours = [schedules.resolution(e, 160, 192, 29, 34) for e in range(40)]
    assert ours == numbers["resolution_160_192_ramp29_34"]
    assert schedules.resolution(3, 160, 160, 0, 0) == 160
