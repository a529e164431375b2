#!/usr/bin/env bash
# The paper's tables on images that anyone can make: FF at every size, MRL and MRL-E, more seeds, the ablations; then
# retrieval, baselines, cascades, the oracle and robustness. The results are in docs/results.md.
#
#   demo/study.sh [CHARACTERS=600] [FOLDER=study_CHARACTERS] [FONTS=/usr/share/fonts]
#
# An hour on two cores of an AMD EPYC with AVX-512 that did other work too; without AVX-512 up to three times as long.
# Stop it when you like: the same command goes on where it was.
# It needs FFCV. 300 characters are in the repository. More are drawn from Debian's fonts: make_kanji.py names the
# packages that FONTS lacks (`apt-get download` and `dpkg -x` into a folder of yours are enough).
set -euo pipefail
characters=${1:-600}
out=$(mkdir -p "${2:-study_$characters}" && cd "${2:-study_$characters}" && pwd)
fonts=$(cd "${3:-/usr/share/fonts}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup.sh
mkdir -p "$out"/{runs,figures,done}
epochs=$((9600 / characters))      # as many steps whatever the number of characters: 16 epochs of 600
export out characters epochs
once() {   # name of a step, command: done unless it was
  [ -e "$out/done/$1" ] || { echo "== $1 ($(date +%T))"; "${@:2}"; touch "$out/done/$1"; }
}

draw() {
  if [ "$characters" = 300 ]; then cp demo/kanji.png "$out"
  else python demo/make_kanji.py --characters "$characters" --fonts "$fonts" --output "$out/kanji.png"; fi
}
once atlas draw
once images python demo/cut_kanji.py "$out" --atlas "$out/kanji.png"
once ffcv env IMAGENET_DIR="$out/images" WRITE_DIR="$out/ffcv" WORKERS=2 train/write_imagenet.sh 32 0.50 90

run() {   # name, flags: train it, then its accuracy, unless they are there
  cd train
  [ -e "$out/runs/$1/final_weights.pt" ] || python -u train_imagenet.py --config-file ../demo/kanji.yaml \
    --model.arch=shufflenet_v2_x0_5 --model.num_classes="$characters" --model.nesting_start=3 --training.epochs="$epochs" \
    --logging.folder="$out/runs" --logging.name="$1" \
    --data.train_dataset="$out/ffcv/train_32_0.50_90.ffcv" --data.val_dataset="$out/ffcv/val_32_uncompressed.ffcv" \
    "${@:2}" 2>>"$out/runs/$1.txt" | sed -un "s/^epoch/$(printf %-9s "$1") epoch/p"
  [ "${PIPESTATUS[0]}" = 0 ] || { tail "$out/runs/$1.txt" >&2; exit 255; }      # 255: xargs starts no other
  cd ../inference
  compgen -G "$out/figures/$1/*.json" >/dev/null || python pytorch_inference.py --path "$out/runs/$1" --dataset V1 \
    --data_root "$out/images" --resize 37 --crop 32 --workers 1 --output "$out/figures/$1" >>"$out/runs/$1.txt" 2>&1
}
export -f run
run_all() {   # lines of `run`'s arguments, two at a time, on half of the cores each
  OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) xargs -P 2 -L 1 bash -c 'run "$@"' run
}
run_all <<END
mrl --model.mrl=1
ff8 --model.fixed_feature=8
ff16 --model.fixed_feature=16
mrl_e --model.efficient=1
ff1024 --model.fixed_feature=1024
ff64 --model.fixed_feature=64
ff32 --model.fixed_feature=32
ff128 --model.fixed_feature=128
mrl_seed1 --model.mrl=1 --training.seed=1
ff8_seed1 --model.fixed_feature=8 --training.seed=1
mrl_seed2 --model.mrl=1 --training.seed=2
ff8_seed2 --model.fixed_feature=8 --training.seed=2
boost8 --model.mrl=1 --model.relative_importance=2,1,1,1,1,1,1,1
ff256 --model.fixed_feature=256
start4 --model.mrl=1 --model.nesting_start=2
ff512 --model.fixed_feature=512
boost8_16 --model.mrl=1 --model.relative_importance=2,1.5,1,1,1,1,1,1
END
# A quarter of the epochs, at a fifth of the rate: as the paper's 10 epochs at 0.1 to its 40 at 0.475.
tuned="--model.mrl=1 --model.init_from=\"$out/runs/ff1024/final_weights.pt\" --training.epochs=$(((epochs + 3) / 4)) --lr.lr=0.02 --lr.lr_peak_epoch=0"
run_all <<END
tune_fc $tuned --model.trainable=fc
tune_conv5 $tuned --model.trainable=fc,conv5
tune_stage4 $tuned --model.trainable=fc,conv5,stage4
END

cd inference
size=(--resize 37 --crop 32 --workers 2)
main=("$out"/runs/{mrl,mrl_e,ff8,ff16,ff32,ff64,ff128,ff256,ff512,ff1024})
once robustness python pytorch_inference.py --path "${main[@]}" --dataset V1 --data_root "$out/images_odd" "${size[@]}" \
  --output "$out/figures_odd"
once embeddings python pytorch_inference.py --path "${main[@]}" --retrieval --dataset 1K --data_root "$out/images" \
  "${size[@]}" --retrieval_array_path "$out/arrays"
once lp python baselines.py lp --arrays "$out/arrays" --model mrl0_e0_ff1024
once svd python baselines.py svd --arrays "$out/arrays" --model mrl0_e0_ff1024 --path "$out/runs/ff1024"
once few-shot python baselines.py ncm --arrays "$out/arrays" --model mrl1_e0_ff1024 --shots 1 3 5 7
for d in 8 16 32 64 128 256 512 1024; do
  once "few-shot-ff$d" python baselines.py ncm --arrays "$out/arrays" --model "mrl0_e0_ff$d" --sizes "$d" --shots 1 3 5 7
done
once outputs python pytorch_inference.py --path "$out/runs/mrl" --dataset V1 --data_root "$out/images" "${size[@]}" \
  --output "$out/outputs" --save_softmax --save_predictions --save_gt

cd ../retrieval
retrieve() { python retrieve.py report --embeddings "$out/arrays" --output "$out/retrieval" --model "$@"; }
for method in svd jl; do
  once "project-$method" python retrieve.py project --embeddings "$out/arrays" --model ff --method $method
done
for model in mrl mrl_e ff ff_svd ff_jl; do once "retrieval-$model" retrieve $model; done
once between retrieve mrl --sizes 12 24 48 96 192 384 768 --output "$out/between"

cd ../model_analysis
cascade() {   # seed
  python cascades.py learn --folder "$out/outputs" --seed "$1" --policy "$out/outputs/policy$1.json"
  python cascades.py apply --folder "$out/outputs" --policy "$out/outputs/policy$1.json" >"$out/outputs/cascade$1.txt"
}
for seed in 0 1 2 3 4; do once "cascade$seed" cascade $seed; done
cd ..
python demo/study_tables.py "$out"
