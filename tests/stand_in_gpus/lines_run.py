"""Which of the lines in WATCHED_LINES (JSON: {file: [lines]}) run? Each is noted once a process in LINES_RUN."""
import json
import os
import sys
import threading
from functools import cache
from pathlib import Path

WATCHED = {file: set(lines) for file, lines in json.loads(Path(os.environ["WATCHED_LINES"]).read_text()).items()}


def watch():
    """In all threads. Only functions with watched lines are followed, and only until each of these has run."""
    sys.settrace(begin)
    threading.settrace(begin)


def begin(frame, *_):
    if frame.f_code.co_filename in WATCHED and left(frame.f_code):
        return line


@cache
def left(code):
    """-> the watched lines of a function that have not run yet."""
    return WATCHED[code.co_filename] & {number for *_, number in code.co_lines()}


def line(frame, event, _):
    if frame.f_lineno in left(frame.f_code):
        left(frame.f_code).discard(frame.f_lineno)
        with open(os.environ["LINES_RUN"], "a") as file:
            file.write(f"{frame.f_code.co_filename}:{frame.f_lineno}\n")
    return line if left(frame.f_code) else None
