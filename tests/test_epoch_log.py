"""An epoch's figures: their names, the printed table, the times of steps, and the log."""
import torch
from epoch_log import Stopwatch, append_events, append_log, forget_after, format_table, named, read_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_names_in_the_log():
    values = torch.tensor([0.25, 0.5])
    assert named({"head": "mrl", "nesting_list": [8, 16]}, "top_1", values) == {"top_1_8": 0.25, "top_1_16": 0.5}
    assert named({"head": "ff8", "nesting_list": [8]}, "top_1", values[:1]) == {"top_1": 0.25}


def test_the_table_hints_where_time_goes():
    record = {"epoch": 0, "current_lr": 0.1, "resolution": 160, "images_per_second": 10, "waiting_for_data": 0.3,
              "waiting_most": 1,
              "train_time": 2, "peak_memory_mb": 5, "train_loss": 1, "val_images": 3, "top_1_8": 0.5, "top_5_8": 1,
              "val_loss_8": 0.7, "train_loss_8": 0.9}
    spec = {"head": "mrl", "nesting_list": [8]}
    text = format_table(record, spec, epochs=2)
    assert "waiting for data 30%" in text and "hint: the device of process 1 waits for data" in text
    assert text.splitlines()[-1].split() == ["8", "50.00", "100.00", "0.7000", "0.9000"]
    text = format_table(record | {"ema_top_1_8": 0.625}, spec, epochs=2)
    assert text.splitlines()[-2:] == ["    size   top-1 %   top-5 %  val loss  train loss  ema top-1 %",
                                      "       8     50.00    100.00    0.7000      0.9000        62.50"]
    assert "hint" not in format_table(record | {"waiting_for_data": 0.1}, spec, epochs=2)


def test_waits_are_what_lies_between_the_steps(monkeypatch):
    moments = iter([10, 11, 14, 16, 16.5, 18])      # steps of 1, 2 and 1.5 s
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        watch.start()
        watch.stop()
    assert watch.summary() == (8, 3.5)


def test_the_log_is_json(tmp_path):
    append_log(tmp_path, {"epoch": 0, "train_loss": float("nan")})
    assert (tmp_path / "log").read_text() == '{"epoch": 0, "train_loss": null}\n'


def test_the_log_forgets_epochs_that_run_again(tmp_path):
    for epoch in range(3):
        append_log(tmp_path, {"epoch": epoch})
    with open(tmp_path / "log", "a") as file:
        file.write('{"epoch": 3, "top')      # killed while writing
    forget_after(tmp_path, 2)
    assert read_log(tmp_path) == [{"epoch": 0}, {"epoch": 1}]


def test_tensorboard_shows_the_log(tmp_path):
    """Epoch 1 was trained twice, after a kill: what it had at first is forgotten."""
    for epoch, top_1 in ((0, 0.25), (1, 0.375), (1, 0.5)):
        append_events(tmp_path, {"timestamp": 1e9, "epoch": epoch, "top_1_8": top_1, "top_1": top_1, "train_loss": 1.5,
                                 "ema_top_1_8": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"timestamp", "epoch", "top_1/8", "top_1", "train_loss", "ema_top_1/8"}
    assert [(event.step, event.value) for event in events.Scalars("top_1/8")] == [(0, 0.25), (1, 0.5)]
    assert events.Scalars("train_loss")[1].wall_time == 1e9
