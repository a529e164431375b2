"""Which version of each package of requirements.txt this Python has, `-` for none, and where it finds MRL.

setup.sh keeps what this prints, and compares at the next start; nothing is imported, which would take seconds.
"""
import ctypes
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path


def version(name):
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"
    return found if name != "ffcv" or libraries_load() else "-"


def libraries_load():
    """Are the system's libraries still there that FFCV was compiled against?"""
    (folder,) = importlib.util.find_spec("ffcv").submodule_search_locations
    try:
        return [ctypes.CDLL(path) for path in Path(folder).glob("_libffcv*")]
    except OSError:
        return False


if __name__ == "__main__":
    lines = (Path(__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = dict.fromkeys(match[0] for line in lines if (match := re.match(r"[\w-]+(?===)", line)))
    print("Python", sys.version.split()[0])
    for name in names:
        print(name, version(name))
    print("MRL", getattr(importlib.util.find_spec("MRL"), "origin", "-"))
