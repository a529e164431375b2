#!/usr/bin/env bash
# ImageNet folders -> the two .ffcv files that train_imagenet.py reads.
#
#   export IMAGENET_DIR=/path/to/pytorch/format/imagenet/directory/    (holds train/ and val/)
#   export WRITE_DIR=/your/path/here/
#   ./write_imagenet.sh 500 0.50 90
#
#   $1  longest side in pixels
#   $2  share of the training images stored as JPEG; the others are raw pixels
#   $3  JPEG quality
#
# Makes $WRITE_DIR/train_$1_$2_$3.ffcv and $WRITE_DIR/val_$1_uncompressed.ffcv (validation images are all raw).
# WORKERS is the number of processes (default: one for each core, 16 at most).
set -euo pipefail
usage="usage: IMAGENET_DIR=... WRITE_DIR=... ./write_imagenet.sh MAX_RESOLUTION JPEG_SHARE JPEG_QUALITY"
[ $# -eq 3 ] || { echo "error: $usage" >&2; exit 2; }
: "${IMAGENET_DIR:?error: set IMAGENET_DIR to the folder that holds train/ and val/. $usage}"
: "${WRITE_DIR:?error: set WRITE_DIR to the folder to write to. $usage}"
IMAGENET_DIR=${IMAGENET_DIR/#\~\//${HOME:-}/} WRITE_DIR=${WRITE_DIR/#\~\//${HOME:-}/}      # as in export WRITE_DIR="~/ffcv"
here=$(dirname "${BASH_SOURCE[0]}")      # no cd: paths are relative to where the user stands
mkdir -p "$WRITE_DIR"

write() {   # split, file name, further flags
  python "$here/write_imagenet.py" --cfg.dataset=imagenet --cfg.split="$1" --cfg.data_dir="$IMAGENET_DIR/$1" \
    --cfg.write_path="$WRITE_DIR/$2" --cfg.max_resolution="$max_resolution" ${WORKERS:+--cfg.num_workers=$WORKERS} \
    --cfg.chunk_size=100 "${@:3}"
}

max_resolution=$1
write train "train_$1_$2_$3.ffcv" --cfg.write_mode=proportion --cfg.compress_probability="$2" --cfg.jpeg_quality="$3"
write val "val_$1_uncompressed.ffcv" --cfg.write_mode=raw
