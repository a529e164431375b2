"""mrl_files.py: whole files, locks, JSON, arrays."""
import ast
import errno
import fcntl
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from conftest import ROOT
from forked import Forked, fork, statuses, wait_for

import mrl_files
from mrl_files import (
    InputError,
    check_labels,
    file_path,
    json_contains,
    locked,
    read_embeddings,
    read_json,
    read_labels,
    replacing,
    write_json,
)


def test_replacing_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "a.npy"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with replacing(target) as path:
        path.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


# ---- files

def wait_for_words(capfd, words, times=1):
    said = []

    def heard():
        said.append(capfd.readouterr().err)
        return "".join(said).count(words) >= times
    wait_for(heard)


def test_locked_lets_one_in_at_a_time(tmp_path, capfd):
    """The first one removes the lock's file while others wait for it: they take turns all the same."""
    path, log = tmp_path / "made/list.npy", tmp_path / "log"

    def note(word):
        with open(log, "a") as file:
            file.write(word)

    def work():
        with locked(path):
            note("in ")
            time.sleep(0.1)
            note("out ")

    def try_once():
        with pytest.raises(InputError, match="in use"), locked(path, "in use"):
            pass

    with locked(path):
        others = [fork(work) for _ in range(4)]
        wait_for_words(capfd, "list.npy: waiting for the process that makes it\n", 4)
        assert statuses([fork(try_once)]) == [0] and not log.exists()
    assert statuses(others) == [0, 0, 0, 0]
    assert log.read_text() == "in out " * 4 and not any(path.parent.iterdir())


def test_locked_after_waiting_for_a_file_that_is_gone(tmp_path, monkeypatch, capfd):
    """One waits, the holder leaves and removes the file, a third locks a new one before the first of them wakes up."""
    woken, third_in, inside, lockf = *(tmp_path / name for name in ("woken", "third_in", "inside")), fcntl.lockf
    path = tmp_path / "made/a"

    def wakes_late(file, how):
        lockf(file, how)
        if how == fcntl.LOCK_EX:                     # only who waits asks so
            woken.touch()
            wait_for(third_in.exists)

    def wait():
        with locked(path):
            inside.touch()

    monkeypatch.setattr("fcntl.lockf", wakes_late)
    with locked(path):
        waiting = fork(wait)
        wait_for_words(capfd, "waiting")
    wait_for(woken.exists)
    with locked(path):
        third_in.touch()
        time.sleep(0.2)
        assert not inside.exists()
    assert statuses([waiting]) == [0] and inside.exists() and not any(path.parent.iterdir())


def test_a_forked_worker_holds_no_lock(tmp_path):
    """A process that is killed leaves its workers behind for seconds; who goes on at once must get in."""
    ready, goes_on = os.pipe(), os.pipe()

    def die_with_a_worker():
        with locked(tmp_path / "a"):
            fork(lambda: (os.close(goes_on[1]), os.write(ready[1], b"!"), os.read(goes_on[0], 1)))
            os.kill(os.getpid(), signal.SIGKILL)

    assert statuses([fork(die_with_a_worker)]) == [-signal.SIGKILL]
    assert os.read(ready[0], 1) == b"!"              # the worker lives, until the other end of its pipe is closed
    with locked(tmp_path / "a", "in use"):
        pass
    for end in (*ready, *goes_on):
        os.close(end)


def test_locked_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def none_here(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none_here)
    with locked(tmp_path / "list.npy"):
        assert "list.npy: no locks on this file system" in capsys.readouterr().err


def test_the_users_home_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in {"~": "/home/me", "~/x": "/home/me/x", "x/~": "x/~", "": "", "./~": "./~", "a b": "a b"}.items():
        assert file_path(text) == path


# ---- what holds for the whole code

def calls():
    """-> (place, what is called, the call) of every call outside tests/."""
    for path in sorted(ROOT.glob("[!.t]*/*.py")) + sorted(ROOT.glob("train/*.py")) + sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def words(node):
    """-> the values of a call's keyword arguments, as text."""
    return {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_every_text_is_read_and_written_as_utf8():
    """Without an encoding it would be the locale's."""
    binary = re.compile(r"(Image|tarfile|os)\.open|.*open_memmap")
    texts = [(place, node) for place, name, node in calls()
             if re.fullmatch(r"open|.*\.(open|read_text|write_text)", name) and not binary.fullmatch(name)
             and not any(re.fullmatch("'[rwa+]*b[+]?'", ast.unparse(word)) for word in node.args)]
    assert len(texts) > 10 and [place for place, node in texts if words(node).get("encoding") != "'utf-8'"] == []


def flags():
    """-> [(place, flag, words)] of every command-line flag."""
    return [(f"{place} {ast.unparse(node.args[0])}", ast.literal_eval(node.args[0]), words(node))
            for place, name, node in calls() if re.fullmatch(r".*add_argument|add", name) and node.args
            and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)]


def test_every_flag_says_what_it_is():
    assert [place for place, _, given in flags() if not given.get("help") and not place.startswith("benchmarks")] == []


def test_every_flag_that_is_a_path_knows_the_users_home():
    """A flag that takes any text is a path, or one of these."""
    others = {"--dataset", "--model", "--arch", "--head", "--device", "--index", "--dump", "--license", "--push",
              "--url", "--collection",
              "value"}
    paths = [place for place, _, given in flags() if given.get("type") in ("file_path", "find_weights")]
    free = [place for place, flag, given in flags() if flag not in others and not {"choices", "action"} & given.keys()
            and given.get("type", "str") in ("str", "Path")]
    assert len(paths) > 20 and free == []


def test_json(tmp_path):
    assert read_json(tmp_path / "a.json") is None
    write_json(tmp_path / "a.json", {"sizes": [8, 16]})
    assert read_json(tmp_path / "a.json") == {"sizes": [8, 16]}
    assert json_contains(tmp_path / "a.json", {"sizes": (8, 16)}) and json_contains(tmp_path / "a.json", {})
    assert not json_contains(tmp_path / "a.json", {"sizes": [8]}) and not json_contains(tmp_path / "b.json", {})
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match=r"a.json: not a JSON file"):
            read_json(tmp_path / "a.json")


def test_embeddings_stay_on_disk(tmp_path):
    np.save(tmp_path / "a-X.npy", np.ones((5, 4), np.float16))
    X = read_embeddings(tmp_path / "a-X.npy")
    assert isinstance(X, np.memmap) and X.shape == (5, 4) and X.dtype == np.float16


@pytest.mark.parametrize("X, note, complaint", [
    (np.zeros((5, 4)), {}, r"is float64 \[5, 4\]"), (np.zeros(5, np.float32), {}, r"is float32 \[5\]"),
    (np.zeros((0, 4), np.float32), {}, r"\[0, 4\]"),
    (np.ones((5, 4), np.float32), {"complete": False}, "unfinished"),
    (np.ones((5, 4), np.float32), {"n": 6, "dim": 4}, r"is \[5, 4\], but a-X.json says \[6, 4\]")])
def test_embeddings_that_are_not_whole_are_refused(tmp_path, X, note, complaint):
    np.save(tmp_path / "a-X.npy", X)
    (tmp_path / "a-X.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match=complaint):
        read_embeddings(tmp_path / "a-X.npy")


def test_a_truncated_file_is_refused(tmp_path):
    np.save(tmp_path / "a-X.npy", np.ones((50, 4), np.float32))
    whole = (tmp_path / "a-X.npy").read_bytes()
    for length in (0, 40, len(whole) - 8):
        (tmp_path / "a-X.npy").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"not a complete .npy file"):
            read_embeddings(tmp_path / "a-X.npy")


@pytest.mark.parametrize("y", [np.arange(5), np.arange(5.0), np.arange(5, dtype=np.float16)[:, None],
                               np.arange(5, dtype=np.uint16), np.array([4201, 0, 1, 2, 3], np.float32)])
def test_labels_of_any_kind_are_read_exactly(tmp_path, y):
    np.save(tmp_path / "y.npy", y)
    labels = read_labels(tmp_path / "y.npy", 5)
    assert labels.dtype == np.int64 and labels.tolist() == y.ravel().tolist()


@pytest.mark.parametrize("y, complaint", [
    (np.array([0, 1, 4201], np.float16)[:, None], "merged classes"), (np.array([0, 0.5, 1]), "whole numbers"),
    (np.array([0, 1]), r"\[2\] labels do not fit 3 embeddings"), (np.zeros((3, 2)), r"\[3, 2\] labels do not fit")])
def test_labels_that_are_not_certain_are_refused(tmp_path, y, complaint):
    np.save(tmp_path / "y.npy", y)
    with pytest.raises(InputError, match=complaint):
        read_labels(tmp_path / "y.npy", 3)


def test_labels_of_any_kind_are_exact_or_refused():
    true = np.arange(4202)
    for stored in (true, true.astype(np.float32), true.astype(np.uint16)):
        labels = check_labels(stored, "y.npy")
        assert labels.dtype == np.int64 and labels.tolist() == true.tolist()
    assert check_labels(np.arange(2048).astype(np.float16)[:, None], "y.npy").shape == (2048, 1)
    merged = true.astype(np.float16)
    assert (merged.astype(int) != true).sum() == 1103                   # what the original's format lost
    with pytest.raises(InputError, match=r"y.npy: float16 labels up to 4200, .*merged classes"):
        check_labels(merged, "y.npy")
    for wrong in (0.5, -1, np.nan, np.inf, "cat"):
        with pytest.raises(InputError, match="whole numbers"):
            check_labels(np.array([0, wrong] if wrong != "cat" else ["cat"]), "y.npy")


def fork_and_go_on(signum):
    def main():
        os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signum))
        if os.fork() == 0:
            os._exit(0)
        time.sleep(5)
        print("went on")
    mrl_files.command_line(main)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_a_process_is_forked_is_not_lost(signum):
    """Python ignores what is raised in a callback of the fork; a dump ran to its end."""
    process = Forked(fork_and_go_on, signum)
    assert process.communicate() == ("", "interrupted\n" if signum == signal.SIGINT else "")
    assert process.returncode == 128 + signum
