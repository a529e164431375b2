"""What every script shares: whole files or none, locks, JSON, arrays, and commands that end in one line.

    with replacing(path) as temporary: ...                     # a file is there whole, or not at all
    raise InputError(f"{path}: what is wrong; what to do")     # bad input
    command_line(main)                                         # how each script runs
"""
import argparse
import errno
import fcntl
import importlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class InputError(ValueError):
    """Invalid user input. The message is one line: what is wrong, where, and what to do."""


@contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed to it if the block succeeds: a half-written file is never visible."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} could not be written: "
                         + ("it is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")   # the suffix stays: savers look at it
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):      # of another file, which the block read
            raise
        raise InputError(f"{path} could not be written: {error.strerror or error}") from None
    except RuntimeError as error:
        if not re.search("inline_container|write error", str(error)):        # what PyTorch's and FAISS's writers raise
            raise
        raise InputError(f"{path} could not be written: is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path, busy=None):
    """Hold an exclusive lock on `path` in the block. busy: error message for a second process; None: it waits.

    It is a POSIX lock, this process's own: forked workers, which may live on for seconds, do not hold it. So a process
    does not shut itself out: not to be nested on one path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    try:
        file = open_locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if busy:
            raise InputError(busy) from None
        print(f"{path.name}: waiting for the process that makes it", file=sys.stderr)
        file = open_locked(name, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):      # some network file systems
            raise
        print(f"{path}: no locks on this file system; start one command at a time", file=sys.stderr)
        file = None
    try:
        yield
    finally:
        name.unlink(missing_ok=True)                 # while it is held: nobody else's is removed
        if file:
            file.close()


def open_locked(name, how):
    """-> the open file `name`, locked. The holder deletes it when it is done. Who waited then holds a deleted file,
    which locks nobody out: again, with the file that is there now."""
    while True:
        file = open(name, "wb")
        try:
            fcntl.lockf(file, how)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def keep_compiled(*signature, **options):
    """numba.njit, which keeps what it made for the next start where there is a folder to keep it in."""
    import numba  # only here: few commands compile, and who loads a model need not have it

    def compile_function(function):
        try:
            return numba.njit(*signature, cache=True, **options)(function)
        except RuntimeError:      # read-only checkout, and no home
            return numba.njit(*signature, **options)(function)
    return compile_function


def read_json(path):
    """-> the dictionary in a JSON file; None where there is no file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON file as this repository writes them; repair or remove it")
    return content


def json_contains(path, wanted):
    """Is there a JSON file that says everything in `wanted`?"""
    content = read_json(path)
    return content is not None and {key: content.get(key) for key in wanted} == json.loads(json.dumps(wanted))


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_array(path, mode="r"):
    """-> the array of an .npy file, memory-mapped. Pickled objects are refused."""
    try:
        array = np.lib.format.open_memmap(path, "r")          # "r+" would lengthen a file that was cut off
        return array if mode == "r" else np.lib.format.open_memmap(path, mode)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, EOFError) as error:
        why = identify_file(path) if "magic" in str(error) else describe_error(error)
        raise InputError(f"{path}: not a complete .npy file of numbers ({why or describe_error(error)})") from None


def allocate(path, shape, dtype):
    """-> a zeroed .npy file, memory-mapped to be written, whose blocks are reserved: a full disk is seen here, and not
    as a crash of a mapped write."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):      # not on macOS
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        return array
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        needed = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
        raise InputError(f"{path}: {needed:.2f} GB are needed: {error.strerror}") from None


def read_embeddings(path):
    """-> X [N, D] float32 or float16, memory-mapped, of an -X.npy file that inference/ wrote, or the original.

    InputError unless it is whole, and what the JSON beside it says of it is true.
    """
    X, noted = read_array(path), Path(path).with_suffix(".json")
    if X.ndim != 2 or 0 in X.shape or X.dtype not in (np.float32, np.float16):
        raise InputError(f"{path}: must be float32 or float16 [N, D], is {X.dtype} {list(X.shape)}")
    said = read_json(noted) or {}
    if not said.get("complete", True):
        raise InputError(f"{path}: unfinished; run the same inference command again to complete it")
    if (said.get("n", X.shape[0]), said.get("dim", X.shape[1])) != X.shape:
        raise InputError(f"{path}: is {list(X.shape)}, but {noted.name} says [{said.get('n')}, {said.get('dim')}]; "
                         "write both again")
    return X


def read_labels(path, n):
    """-> y [n] int64. The original's float16 [n, 1] files are read where float16 is exact."""
    y = read_array(path)
    if y.shape not in ((n,), (n, 1)):
        raise InputError(f"{path}: {list(y.shape)} labels do not fit {n} embeddings; write both again")
    return check_labels(y, path).reshape(-1)


def check_labels(y, path):
    """-> the labels of a file as int64 of the same shape, if they are class numbers.

    float16 (the original's) holds every integer up to 2048 and only every second one above: 2049 was stored as 2048.
    """
    y = np.asarray(y)
    if y.dtype.kind not in "iuf" or not np.isfinite(y).all() or (y != np.floor(y)).any() or (y < 0).any():
        raise InputError(f"{path}: labels must be whole numbers from 0 up")
    if y.dtype == np.float16 and y.max(initial=0) >= 2048:
        raise InputError(f"{path}: float16 labels up to {y.max():.0f}, where float16 has merged classes; "
                         "dump the embeddings again")
    return y.astype(np.int64)


# What people have in a file's place: how it begins, what it is and what to do.
AGAIN = "download the file itself again"
SAFETENSORS = "a safetensors file: give it a name that ends in .safetensors"
FOREIGN = {
    rb"(?s).{4}\0{4}\{": SAFETENSORS,
    rb"version https://git-lfs": f"a git-LFS pointer, not the file: run git lfs pull in its repository, or {AGAIN}",
    rb"(\xef\xbb\xbf)?\s*<[!?A-Za-z]": f"a web page (HTML or XML): {AGAIN}",
    rb"\s*\{": f"a JSON text: if it is what a server answered, {AGAIN}",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!": f"packed (gzip, xz, zstd ...): unpack it, or {AGAIN}",
    rb"(?s).{257}ustar": f"a tar archive: unpack it, or {AGAIN}",
    rb"(?s)\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|II\*\0|MM\0\*": "an image",
    rb"\x93NUMPY": "a NumPy array",
    rb"\x89HDF": "an HDF5 file, not of PyTorch",
    rb"\0{16}": f"zeros where a file begins, what an unfinished download or copy leaves: {AGAIN}",
    rb"[\t\r\n -~]{4}": f"a text: {AGAIN}",
}


def identify_file(path):
    """-> what a file that could not be read is, by its first bytes, and what to do; None where they do not tell."""
    try:
        with open(path, "rb") as file:
            begin = file.read(512)
    except OSError:
        return None
    if not begin:
        return f"empty: {AGAIN}"
    if begin.startswith(b"PK\3\4"):
        return identify_zip(path)
    return next((what for pattern, what in FOREIGN.items() if re.match(pattern, begin)), None)


def identify_zip(path):
    """The same of a zip archive, as PyTorch's checkpoints are."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return f"truncated (a checkpoint or another zip archive): {AGAIN}"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive: save the model's state_dict() instead"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive of {names[0] if names else 'nothing'} ...: unpack it, or {AGAIN}"
    return None


def import_extra(name, what, package=None):
    """-> the module of a package that only `what` needs; InputError with pip's command where it is not installed.
    package: pip's name for it, where that is another."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(f"{what} needs a package: pip install {package or name.split('.')[0]}") from None


def file_path(text):
    """A type for argparse: a path. ~ at its beginning is the user's home, which a shell leaves in `--folder=~/x`."""
    return os.path.expanduser(text)


def numbers(kind):
    """A type for argparse: '8,16,32' -> [8, 16, 32]."""
    def read(text):
        return [kind(word) for word in text.strip("[]() ").split(",")]

    read.__name__ = f"list of {kind.__name__}s"
    return read


def bounded(kind, least, most=math.inf):
    """A type for argparse: an int or a float from `least` to `most`; NaN and infinity are neither."""
    def read(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"{least} or more" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    read.__name__ = kind.__name__          # argparse names it where `kind` cannot read the text
    return read


def find_device(name, flag="--device"):
    """-> torch.device, if it can compute here (a GPU may be too old for the kernels in PyTorch's wheels)."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{flag} {name}: {describe_error(error)}") from None
    return torch.device(name)


def rank():
    """Which of torchrun's processes this is; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many they are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(item):
    """-> list of every process's item (plain objects), in each process."""
    items = [item] * world()
    if world() > 1:
        dist.all_gather_object(items, item)
    return items


@contextmanager
def ended_by_sigterm():
    """Around the wait for the other processes, in which no handler of Python's would run: torchrun, which ends the
    others where one refuses its settings, would get no answer and wait 30 s. Nothing is lost yet."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def leave_group(together=True):
    """Leave the process group, if there is one. together: its end waits for the other processes, so not after an error,
    when they may wait for this one.

    First gloo's threads get the time to let go of their last tensors, for which they need Python's lock: PyTorch 2.6
    waits for them holding that lock, and at Python's exit they die in asking for it, and the process aborts.
    """
    if dist.is_initialized():
        time.sleep(0.1)
        if together:
            dist.destroy_process_group()


def command_line(main):
    """Run a script's main. Bad input ends with one line and exit status 1, Ctrl-C with 130, SIGTERM with 143."""
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # so that temporary files are removed
    sys.unraisablehook = stop_again
    sys.stdout.reconfigure(errors="backslashreplace")      # as stderr does: names of files that it cannot show
    complaint = run_until_stopped(main)      # printed here, when the exception is gone and progress bars have ended
    if complaint == "interrupted":
        print(complaint, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if complaint is not None:
        sys.exit("error: " + " ".join(complaint.split()))


def stop_again(ignored):
    """What a signal raises while a process is forked, Python may ignore, as any exception in a fork's callbacks: it is
    raised again 10 ms later."""
    if not isinstance(ignored.exc_value, SystemExit | KeyboardInterrupt):
        return sys.__unraisablehook__(ignored)
    stop = ignored.exc_value.with_traceback(None)

    def stop_now(*_):
        raise stop
    signal.signal(signal.SIGALRM, stop_now)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def run_until_stopped(main):
    """Run main -> None, or why it ended."""
    try:
        main()
        flush_output()
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):    # PyTorch's MemoryError
            raise
        return f"not enough memory; smaller batches or images, or fewer classes, need less ({describe_error(error)})"
    except KeyboardInterrupt:
        return "interrupted"


def flush_output():
    """Flush now: a failure at interpreter exit would print Python's own message and give status 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())       # at its exit Python writes what is left once more
        raise InputError(f"standard output: {error.strerror}") from None


def describe_error(error):
    """-> what an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
