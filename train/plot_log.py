"""A picture of a run: top-1 accuracy of each size over the epochs, from the log in its folder.

    python plot_log.py trainlogs/<uuid>                    writes trainlogs/<uuid>/accuracy.png; also while it trains
"""
import argparse
import re
from pathlib import Path

from epoch_log import read_log
from matplotlib import colormaps
from matplotlib.figure import Figure

from mrl_files import InputError, command_line, file_path, replacing


def read_accuracies(folder):
    """-> {name: ([epochs], [top-1 in per cent])}, a name for each size ("8", "16" ...), "top-1" of fixed features."""
    lines = {}
    for record in read_log(folder):
        for key, value in record.items():
            if (match := re.fullmatch(r"top_1(?:_(\d+))?", key)) and record["epoch"] >= 0:
                epochs, accuracies = lines.setdefault(match[1] or "top-1", ([], []))
                epochs.append(record["epoch"] + 1)
                accuracies.append(100 * value)
    if not lines:
        raise InputError(f"{folder / 'log'}: no accuracies in it; give the folder of a run of train_imagenet.py")
    return lines


def plot(lines, title):
    """-> a figure, a line for each size, from dark (the smallest) to light."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, (epochs, accuracies)) in enumerate(lines.items()):
        axes.plot(epochs, accuracies, marker=".", label=name, color=colormaps["viridis"](0.9 * i / len(lines)))
    axes.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="size", fontsize="small")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=file_path, help="run folder")
    parser.add_argument("--output", type=file_path, help="picture to write (default: accuracy.png in the run folder)")
    args = parser.parse_args()
    output = Path(args.output or Path(args.folder) / "accuracy.png")
    lines = read_accuracies(Path(args.folder))
    with replacing(output) as temporary:
        plot(lines, Path(args.folder).name).savefig(temporary, dpi=150)
    print(output)


if __name__ == "__main__":
    command_line(main)
