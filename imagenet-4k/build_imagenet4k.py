"""Build ImageNet-4K (appendix B) from ImageNet-21K: 4,202 classes, 1,000 database and 50 query images each.

    python build_imagenet4k.py --source /data/imagenet21k --output /data/IMAGENET/imagenet-4k

--source holds a folder `n00005787/` or a file `n00005787.tar` for each class of IDtoClass.txt. The result,
`train/<class>/` (database) and `val/<class>/` (queries), is what `pytorch_inference.py --retrieval --dataset 4K` reads.
Images are linked (--copy: copied; from tar files: extracted). Which ones: those of --list, else by a fixed rule: of a
class's file names in sorted order the first 1,000 are the database, the next 50 the queries.
A second run goes on where the first stopped, and checks what is there; with --copy it takes the place of links.
"""
import argparse
import lzma
import shutil
import tarfile
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from mrl_files import InputError, bounded, command_line, file_path, replacing
from mrl_images import is_image

HERE = Path(__file__).resolve().parent
COUNTS = {"train": 1000, "val": 50}


def class_ids(path=HERE / "IDtoClass.txt"):
    """-> the classes of a list whose lines begin with a synset id."""
    ids = [line.split()[0] for line in read_lines(path) if line.strip()]
    wrong = [name for name, times in Counter(ids).items() if times > 1 or Path(name).name != name]
    if wrong or not ids:
        raise InputError(f"{path}: must list classes, each once and by its folder's name; "
                         + (f"wrong: {', '.join(wrong[:5])}" if wrong else "it is empty"))
    return ids


def read_lines(path):
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8)") from None


# ------------------------------------------------------------------------------------------------ which images

def by_rule(source, classes, counts):
    """-> {class: {"train": names, "val": names}}: file names in sorted order, first the database, then the queries."""
    plan, short, n, wanted = {}, [], counts["train"], sum(counts.values())
    for name in tqdm(classes, desc="listing", unit="class"):
        files = image_names(source, name)
        if len(files) < wanted:
            short.append(f"{name} ({len(files)})")
        plan[name] = {"train": files[:n], "val": files[n:wanted]}
    if short:
        raise InputError(f"{source}: {len(short)} class(es) with fewer than {wanted} images: {', '.join(short)}")
    return plan


def by_list(path, classes, counts):
    """The same from a file of lines `train/<class>/<file name>` and `val/<class>/<file name>`."""
    plan = {name: {split: [] for split in counts} for name in classes}
    for row, line in enumerate(read_lines(path), start=1):
        parts = line.strip().split("/")
        if len(parts) != 3 or parts[0] not in counts or parts[1] not in plan:
            raise InputError(f"{path}, line {row}: {line!r} is not train/<class>/<file> or val/<class>/<file>, "
                             "with a class of the list of classes")
        plan[parts[1]][parts[0]].append(parts[2])
    wrong = [name for name, files in plan.items() if {split: len(files[split]) for split in counts} != counts
             or len(set().union(*files.values())) != sum(counts.values())]
    if wrong:
        raise InputError(f"{path}: {len(wrong)} class(es) without {counts['train']} train and {counts['val']} val "
                         f"images, all different: {', '.join(wrong)}")
    return plan


def image_names(source, name):
    """-> the image files of a class, sorted, from its folder or its tar file."""
    folder, archive = Path(source, name), Path(source, f"{name}.tar")
    if folder.is_dir():
        names = [path.name for path in folder.iterdir()]
    elif archive.is_file():
        with open_tar(archive) as tar:
            names = [Path(member.name).name for member in tar if member.isfile()]
    else:
        raise InputError(f"{source}: neither {name}/ nor {name}.tar is there")
    return sorted({file for file in names if is_image(file)})      # a tar file may hold a name twice


@contextmanager
def open_tar(archive):
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{archive}: not a tar file, or truncated ({error})") from None


# ------------------------------------------------------------------------------------------------ building

def build(source, output, plan, copy=False):
    """Make the folders of a plan; files that are there already stay."""
    for name, splits in tqdm(plan.items(), desc="building", unit="class"):
        for split in splits:
            Path(output, split, name).mkdir(parents=True, exist_ok=True)
            for left in Path(output, split, name).glob(".*"):      # half a file of a run that was killed
                if not left.is_dir():
                    left.unlink()
        places = {file: Path(output, split, name, file) for split, files in splits.items() for file in files}
        missing = {file: place for file, place in places.items() if not is_there(place, copy)}
        if Path(source, name).is_dir():
            from_folder(Path(source, name).resolve(), missing, copy)
        elif missing:
            from_tar(Path(source, f"{name}.tar"), missing)


def is_there(place, copy):
    """An image of an earlier run; a link is none where copies are wanted."""
    return place.exists() and place.stat().st_size > 0 and not (copy and place.is_symlink())


def from_folder(folder, places, copy):
    for file, place in places.items():
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is not there")
        check_not_empty(folder / file, (folder / file).stat().st_size)
        with replacing(place) as temporary:
            if copy:
                shutil.copyfile(folder / file, temporary)
            else:
                temporary.symlink_to(folder / file)


def from_tar(archive, places):
    with open_tar(archive) as tar:
        for member in tar:
            place = places.pop(Path(member.name).name, None) if member.isfile() else None
            if place:
                check_not_empty(f"{archive}: {member.name}", member.size)
                with replacing(place) as temporary, open(temporary, "wb") as out:
                    shutil.copyfileobj(tar.extractfile(member), out)
    if places:
        raise InputError(f"{archive}: {min(places)} is not in it ({len(places)} file(s) missing)")


def check_not_empty(image, size):
    if size == 0:
        raise InputError(f"{image} is empty; get it again, or leave it out of the source")


def verify(output, plan):
    """The folders hold the plan's files, each of them readable through its link, and nothing else."""
    for split in COUNTS:
        found = {folder.name: {file.name for file in list_visible(folder) if file.exists()}
                 for folder in list_visible(Path(output, split))}
        wrong = [name for name in sorted(found.keys() | plan.keys())
                 if found.get(name) != (set(plan[name][split]) if name in plan else None)]
        if wrong:
            raise InputError(f"{Path(output, split)}: {len(wrong)} folder(s) hold other files than the selection's: "
                             f"{', '.join(wrong[:5])}; remove them and run again")


def list_visible(folder):
    """-> what lies in a folder, but for hidden files and folders, which no reader takes for images or classes."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=file_path, required=True, help="ImageNet-21K: class folders or tar files")
    parser.add_argument("--output", type=file_path, required=True, help="folder to make, <data root>/imagenet-4k")
    parser.add_argument("--list", type=file_path, help="file of lines train/<class>/<file> and val/<class>/<file>")
    parser.add_argument("--copy", action="store_true", help="copy images instead of linking them")
    parser.add_argument("--classes", type=file_path, default=HERE / "IDtoClass.txt",
                        help="list of classes (default: the 4,202)")
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=bounded(int, 1), default=count, help=f"{split} images a class ({count})")
    return parser.parse_args()


def main():
    args = parse_arguments()
    classes, counts = class_ids(args.classes), {"train": args.train, "val": args.val}
    plan = by_list(args.list, classes, counts) if args.list else by_rule(args.source, classes, counts)
    build(args.source, args.output, plan, args.copy)
    verify(args.output, plan)
    print(f"{args.output}: {len(classes)} classes, {len(classes) * args.train} database images (train), "
          f"{len(classes) * args.val} query images (val)")


if __name__ == "__main__":
    command_line(main)
