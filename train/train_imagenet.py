"""Train a ResNet50 (or any classifier of torchvision or timm) with a Matryoshka, MRL-E or fixed-feature head.

    python train_imagenet.py --config-file rn50_configs/rn50_40_epochs.yaml --model.mrl=1 \\
        --data.train_dataset=$WRITE_DIR/train_500_0.50_90.ffcv \\
        --data.val_dataset=$WRITE_DIR/val_500_uncompressed.ffcv \\
        --data.num_workers=12 --data.in_memory=1 --logging.folder=trainlogs --logging.log_level=1 \\
        --dist.world_size=2 --training.distributed=1 --lr.lr=0.425

On ImageNet with two GPUs the paper reports top-1 of 66.63 % at 8 dimensions, 76.80 % at 2048 (Table 1).
Reads the files of write_imagenet.sh, or the folders that they are made of; leaves a run folder (see checkpoint.py)
under --logging.folder.
"""
import time
import uuid
from contextlib import nullcontext
from pathlib import Path

import checkpoint
import epoch_log
import launch
import schedules
from augmentation import SCALE, VALIDATION_RATIO
from fastargs import Config, Param, Section
from fastargs.validation import And, InRange, OneOf
from loaders import check_data, train_loader, val_loader
from recipe import check_images, check_training, make_model, model_spec
from settings import PATH, TEXT, as_dict, read_flag, read_settings
from trainer import Trainer

from mrl_files import InputError, command_line, file_path, import_extra, rank, world
from mrl_images import name_dead_workers

SWITCH = And(int, OneOf([0, 1]))
COUNT = And(int, InRange(min=1))
WHOLE = And(int, InRange(min=0))
AMOUNT = And(float, InRange(min=0))
SHARE = And(float, InRange(min=0, max=1))
CONFIG = Config()

Section("model", "the network", CONFIG).params(
    arch=Param(TEXT, "torchvision classifier, or timm/<name> (pip install timm)", default="resnet18"),
    pretrained=Param(SWITCH, "the library's weights for the backbone", default=0),
    efficient=Param(SWITCH, "MRL-E: one matrix whose columns all sizes share", default=0),
    mrl=Param(SWITCH, "MRL: one classifier per size", default=0),
    nesting_start=Param(WHOLE, "smallest size is 2**this", default=3),
    nesting_list=Param(TEXT, "sizes instead of the powers of two, such as 8,212,416"),
    fixed_feature=Param(COUNT, "neither mrl nor efficient: size of the fixed-feature baseline [default: all features]"),
    relative_importance=Param(TEXT, "weights of the sizes' losses, such as 2,1,1,1,1,1,1,1,1 [default: all 1]"),
    num_classes=Param(COUNT, "number of classes", default=1000),
    init_from=Param(PATH, "fine-tune: begin with the backbone of this final_weights.pt; the head begins anew"),
    trainable=Param(TEXT, "fine-tune: parts that learn, such as fc,layer4.2.conv3 (the others stay as they are)"),
)
Section("resolution", "progressive resizing", CONFIG).params(
    min_res=Param(COUNT, "pixels a side up to start_ramp", default=160),
    max_res=Param(COUNT, "pixels a side from end_ramp", default=160),
    start_ramp=Param(WHOLE, "epoch", default=0),
    end_ramp=Param(WHOLE, "epoch", default=0),
)
Section("data", "folders of class folders, or the .ffcv files that write_imagenet.sh makes of them", CONFIG).params(
    train_dataset=Param(PATH, "folder or .ffcv file", required=True),
    val_dataset=Param(PATH, "folder or .ffcv file", required=True),
    num_workers=Param(int, "what decodes for each process: threads, or processes of a folder; 0: one for each core",
                      required=True),
    in_memory=Param(SWITCH, "the .ffcv file for training fits in memory", default=1),
)
Section("lr", "learning rate: 1.7 * global batch / 4096 for ResNet50 and SGD", CONFIG).params(
    lr=Param(AMOUNT, "peak", default=0.5),
    lr_schedule_type=Param(OneOf(["step", "cyclic", "constant", "cosine"]), "shape", default="cyclic"),
    warmup_epochs=Param(WHOLE, "cosine: epochs of the way up [default: 0]"),
    lr_peak_epoch=Param(WHOLE, "cyclic: epoch of the peak", default=schedules.PEAK),
    step_ratio=Param(AMOUNT, "step: factor", default=0.1),
    step_length=Param(COUNT, "step: epochs between steps", default=30),
)
Section("logging", "what is left behind", CONFIG).params(
    folder=Param(PATH, "where run folders are made", required=True),
    name=Param(TEXT, "name of the run folder [default: a new uuid]; a named run that was stopped goes on"),
    log_level=Param(And(int, OneOf([0, 1, 2])), "0: validate at the end; 1: each epoch; 2: also the loss in the bar",
                    default=1),
    tensorboard=Param(SWITCH, "write the log for TensorBoard too", default=0),
)
Section("validation", "validation", CONFIG).params(
    batch_size=Param(COUNT, "per process", default=512),
    resolution=Param(COUNT, "pixels a side of the centre crop (224/256 of the shorter side; "
                                 "of a timm network its own share)", default=224),
    lr_tta=Param(SWITCH, "add the mirrored image's logits", default=1),
)
Section("training", "training", CONFIG).params(
    eval_only=Param(SWITCH, "only validate the weights in path", default=0),
    path=Param(PATH, "weights for eval_only"),
    batch_size=Param(COUNT, "per process", default=512),
    optimizer=Param(And(str, OneOf(["sgd", "adamw"])), "optimiser", default="sgd"),
    momentum=Param(AMOUNT, "momentum of sgd", default=0.9),
    weight_decay=Param(AMOUNT, "weight decay", default=4e-5),
    bn_wd=Param(AMOUNT, "weight decay of norm parameters; of adamw's biases too", default=0.0),
    norms_by_type=Param(SWITCH, "sgd: norm parameters by module type, not by 'bn' in the name (which misses "
                        "downsample.1)", default=0),
    epochs=Param(COUNT, "epochs", default=30),
    accumulate=Param(COUNT, "batches to an optimiser step [default: 1]"),
    clip_grad_norm=Param(AMOUNT, "largest norm of the gradient [default: any]"),
    ema=Param(SHARE, "decay of an average of the weights, such as 0.9999; validated beside them, saved as "
              "final_weights_ema.pt [default: none]"),
    mixup=Param(AMOUNT, "alpha of mixup, such as 0.2 [default: none]"),
    cutmix=Param(AMOUNT, "alpha of CutMix, such as 1; with mixup, each batch has one of them [default: none]"),
    label_smoothing=Param(SHARE, "label smoothing", default=0.1),
    crop_scale=Param(SHARE, "least share of an image in a random crop", default=SCALE),
    flip=Param(SWITCH, "mirror images with chance 1/2; 0 where left and right differ, as in text", default=1),
    distributed=Param(SWITCH, "start dist.world_size processes", default=0),
    use_blurpool=Param(SWITCH, "blur before strided convolutions", default=0),
    device=Param(And(str, OneOf(["cuda", "cpu"])), "cpu only where asked for", default="cuda"),
    precision=Param(And(str, OneOf(["fp16", "bf16", "fp32"])), "[default: fp16 on a GPU, fp32 on a CPU]"),
    compile=Param(SWITCH, "torch.compile", default=0),
    seed=Param(And(int, InRange(min=0, max=2 ** 32 - 1)), "initial weights, order, crops and flips", default=0),
    resume=Param(PATH, "run folder to continue, with its own settings"),
)
Section("dist", "processes started by this script; under torchrun its environment wins", CONFIG).params(
    world_size=Param(COUNT, "processes, one per GPU", default=1),
    address=Param(TEXT, "where they meet", default="localhost"),
    port=Param(TEXT, "where they meet", default="12355"),
)


@name_dead_workers("fewer --data.num_workers or smaller batches")
def worker(device, settings, spec, folder):
    """What every process does."""
    d, v = settings.data, settings.validation
    stop = None if settings.training.eval_only else launch.StopRequest()
    trainer = Trainer(device, settings, spec, folder)
    val = val_loader(d.val_dataset, batch_size=v.batch_size, num_workers=d.num_workers, resolution=v.resolution,
                     device=device, rank=rank(), world_size=world(),
                     ratio=spec.get("crop_pct", VALIDATION_RATIO))
    if settings.training.eval_only:
        return validate_only(trainer, val)
    with checkpoint.lock_folder(folder) if rank() == 0 else nullcontext():
        train_to_the_end(trainer, val, stop)


def train_to_the_end(trainer, val, stop):
    """Train from the last checkpoint on, or from the beginning, to the end."""
    settings, folder = trainer.settings, trainer.folder
    if state := launch.share(checkpoint.restore(folder) if rank() == 0 else None):
        trainer.restore(state)
    if rank() == 0:
        epoch_log.forget_after(folder, trainer.epoch)
    d, t = settings.data, settings.training
    train = train_loader(d.train_dataset, batch_size=t.batch_size, num_workers=d.num_workers, in_memory=d.in_memory,
                         resolution=settings.resolution.min_res, seed=t.seed, device=trainer.device,
                         distributed=world() > 1, scale=t.crop_scale, flip=t.flip)
    trainer.run(train, val, stop)


def validate_only(trainer, val):
    record = {"epoch": -1, "timestamp": time.time(), **trainer.validate(val)}
    if rank() == 0:
        epoch_log.append_log(trainer.folder, record)
        print("\n".join(epoch_log.format_sizes(record, trainer.spec)))


def run_folder(settings):
    """Named by --logging.name, by torchrun (so that its restart finds the folder), or by a new uuid."""
    name = settings.logging.name or launch.torchrun_name() or str(uuid.uuid4())
    if "/" in name or name in (".", ".."):
        raise InputError(f"--logging.name={name}: give a name alone; --logging.folder says where")
    return Path(settings.logging.folder) / name


def check_settings(settings, spec):
    """Raise InputError for settings that would fail, or silently go wrong, only after the processes have started."""
    launch.check_devices(settings)
    if settings.logging.tensorboard:
        import_extra("tensorboard", "--logging.tensorboard=1")
    if settings.training.eval_only != bool(settings.training.path):
        raise InputError("--training.eval_only=1 and --training.path=<weights> go together")
    if settings.training.precision == "fp16" and settings.training.device == "cpu":
        raise InputError("--training.precision=fp16: on a CPU use fp32 or bf16")
    schedules.check_schedules(settings)
    check_training(settings.training, settings.lr)
    if settings.dist.world_size > 1 and not settings.data.in_memory and Path(settings.data.train_dataset).is_file():
        raise InputError("--data.in_memory=0 with several processes: FFCV would hold nearly the whole file in each; "
                         "give 1: the file is mapped, and what does not fit in memory is read again")
    check_images(settings, spec)
    images = check_data(settings.data.train_dataset, settings.data.val_dataset, spec["num_classes"])
    batch = settings.training.batch_size * settings.dist.world_size
    if images < batch:
        raise InputError(f"{settings.data.train_dataset}: {images} images are fewer than one batch "
                         f"({batch} over all processes); lower --training.batch_size")
    if settings.training.path or settings.model.init_from or settings.model.trainable:
        make_model(settings, spec, "cpu")      # says whether the files and names fit


def open_folder(folder, settings, spec):
    """Make a run folder, or find the run that goes on in it."""
    settings = as_dict(settings)
    if not (folder / "params.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_params(folder, settings, spec)
    defaults = {".".join(path): param.default for path, param in CONFIG.entries.items()}
    checkpoint.check_same_run(folder, settings, defaults)
    if (folder / "final_weights.pt").exists() and not settings["training"]["eval_only"]:
        raise InputError(f"{folder}: this run is finished; choose another --logging.name")
    print(f"run folder: {folder}", flush=True)


def main():
    folder = read_flag("--training.resume", type=lambda text: Path(file_path(text)))      # the settings come from there
    settings = read_settings(CONFIG, __doc__, checkpoint.saved_settings(folder) if folder else None)
    if settings.training.resume and not folder:
        raise InputError("training.resume in a config file: give --training.resume on the command line")
    settings.dist.world_size = launch.world_size(settings)
    spec = model_spec(settings)
    check_settings(settings, spec)
    folder = folder or run_folder(settings)
    if launch.is_first():
        open_folder(folder, settings, spec)
    launch.launch(worker, settings, spec, folder)


if __name__ == "__main__":
    command_line(main)
