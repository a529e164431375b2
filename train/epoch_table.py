"""An epoch's figures under the names they have in the log, and as a table for people. Used by trainer.py."""


def endings(spec):
    """-> what a name has at its end for each size: _8, _16 ...; nothing for a fixed-feature model, which has one."""
    return [""] if spec["head"].startswith("ff") else [f"_{size}" for size in spec["nesting_list"]]


def named(spec, name, values):
    """values [G] -> one entry a size: top_1_8, top_1_16 ..., or top_1."""
    return {f"{name}{end}": value for end, value in zip(endings(spec), values.tolist(), strict=True)}


def table(record, spec, epochs):
    """The end of an epoch: one line of facts, then a row a size, accuracies in per cent."""
    lines = [f"epoch {record['epoch'] + 1}/{epochs}  lr {record['current_lr']:.4f}  "
             f"{record['resolution']} px  {record['images_per_second']:.0f} images/s  "
             f"waiting for data {record['waiting_for_data']:.0%}  {record['train_time']:.1f} s  "
             f"peak {record['peak_memory_mb']:.0f} MB  loss {record['train_loss']:.4f}"]
    if record["waiting_for_data"] > 0.2:
        lines.append(f"  hint: the device of process {record['waiting_most']} waits for data; more "
                     "--data.num_workers, more CPU cores, or a file with fewer JPEGs (write_imagenet.sh) would help")
    if "val_images" in record:
        lines.append("    size   top-1 %   top-5 %  val loss  train loss")
        for size, end in zip(spec["nesting_list"], endings(spec), strict=True):
            top_1, top_5, val, train = (record[f"{k}{end}"] for k in ("top_1", "top_5", "val_loss", "train_loss"))
            lines.append(f"  {size:6d} {100 * top_1:9.2f} {100 * top_5:9.2f} {val:9.4f} {train:11.4f}")
    return "\n".join(lines)
