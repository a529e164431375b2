"""The picture of a run: its lines are the log's figures."""
import plot_log
import pytest
from epoch_log import append_log
from PIL import Image

from mrl_files import InputError


def test_the_lines_are_the_logs(tmp_path):
    for epoch in range(3):
        validated = {"top_1_8": 0.1 * epoch, "top_1_16": 0.2 * epoch, "top_5_8": 1.0} if epoch != 1 else {}
        append_log(tmp_path, {"epoch": epoch, "train_loss": 1.0, **validated})
    append_log(tmp_path, {"epoch": -1, "top_1_8": 0.9})      # of --training.eval_only
    lines = plot_log.read_accuracies(tmp_path)
    assert list(lines) == ["8", "16"]
    assert lines["8"][0] == [1, 3] and lines["8"][1] == pytest.approx([0, 20])
    (axes,) = plot_log.plot(lines, "run").axes
    assert [line.get_label() for line in axes.lines] == ["8", "16"]
    assert axes.lines[1].get_ydata() == pytest.approx([0, 40])


def test_the_command_writes_a_picture(tmp_path, monkeypatch, capsys):
    append_log(tmp_path, {"epoch": 0, "top_1": 0.5})
    for flags, picture in (([], "accuracy.png"), (["--output", str(tmp_path / "a.png")], "a.png")):
        monkeypatch.setattr("sys.argv", ["plot_log.py", str(tmp_path), *flags])
        plot_log.main()
        with Image.open(tmp_path / picture) as image:
            assert image.size == (900, 600)
    assert capsys.readouterr().out.endswith("a.png\n")


def test_no_log_or_one_without_accuracies(tmp_path):
    with pytest.raises(InputError, match="log: no accuracies in it"):
        plot_log.read_accuracies(tmp_path)
    append_log(tmp_path, {"epoch": 0, "train_loss": 1.0})
    with pytest.raises(InputError, match="log: no accuracies in it"):
        plot_log.read_accuracies(tmp_path)
