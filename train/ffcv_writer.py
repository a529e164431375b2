"""Images -> one .ffcv file, by FFCV's writer, whose processes are looked after. Used by write_imagenet.py."""
import multiprocessing
import signal
import sys
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory

import ffcv_repairs  # noqa: F401  (before FFCV, whose import takes 5 seconds more without)
from ffcv import writer as ffcv_writing
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter

from mrl_files import InputError

WORKERS = []      # FFCV's writer starts them and, if one fails, waits for ever: `supervised` looks after them


class Worker(multiprocessing.Process):
    def __init__(self, target, args):
        super().__init__(target=target, args=args)
        self.work = args[0]                 # the queue of images
        WORKERS.append(self)

    def run(self):
        for signum in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        try:
            super().run()
        except Exception as error:
            sys.exit(f"writing failed: {error}")


ffcv_writing.Process = Worker


@contextmanager
def supervised(writer, path):
    """Ends FFCV's writing when one of its processes fails; whatever ends it, no process and no shared memory stays."""
    def look(*_):
        if any(worker.exitcode for worker in WORKERS):
            raise InputError(f"{path} could not be written: a process failed or was killed; is disk or memory full?")

    WORKERS.clear()
    before = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGCHLD, before)
        for worker in WORKERS:
            worker.work.cancel_join_thread()
            worker.kill()
        if isinstance(shared := getattr(writer, "metadata_sm", None), SharedMemory):
            shared.close()
            shared.unlink()
        raise
    finally:
        signal.signal(signal.SIGCHLD, before)


def page_size(max_resolution):
    """A page must hold one raw image."""
    return max(4 * MIN_PAGE_SIZE, 1 << (3 * max_resolution ** 2 - 1).bit_length())


def write_file(path, images, cfg):
    """The items of `images`, (RGB image, label), as the settings say; InputError where a process fails."""
    compress = {} if cfg.compress_probability is None else {"compress_probability": cfg.compress_probability}
    image = RGBImageField(write_mode=cfg.write_mode, max_resolution=cfg.max_resolution,
                          jpeg_quality=cfg.jpeg_quality, **compress)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=cfg.num_workers,
                           page_size=page_size(cfg.max_resolution))
    with supervised(writer, cfg.write_path):
        writer.from_indexed_dataset(images, chunksize=cfg.chunk_size)
