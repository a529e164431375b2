#!/usr/bin/env bash
# The whole idea on 13,200 real images, on any machine: images (-> .ffcv) -> checkpoints -> accuracy, embeddings, pictures.
#
#   ./demo.sh [FOLDER=demo_out]        2.5 to 5.5 minutes on two cores, after the set-up
#
# Every step below is a script that a user of ImageNet runs too; demo/kanji.yaml makes the training small.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
out=$(mkdir -p "${1:-demo_out}" && cd "${1:-demo_out}" && pwd)
if [ -n "$(ls -A "$out")" ] && [ ! -e "$out/.mrl-demo" ]; then      # it removes folders of an earlier run below
  echo "error: $out is not empty, and not made by demo.sh; name a new folder" >&2
  exit 1
fi
touch "$out/.mrl-demo"
step() { echo; echo "== $* ($((SECONDS / 60)) min $((SECONDS % 60)) s)"; }
SECONDS=0

step "printed characters as an ImageNet-style folder tree"
rm -rf "$out"/{images,images_odd,ffcv,runs,figures,figures_odd,arrays,retrieval,notebooks}
mkdir -p "$out"/{runs,notebooks}
python demo/cut_kanji.py "$out"
if grep -q '^ffcv -' "$done_file"; then
  echo "training reads these folders"
  train_data=$out/images/train val_data=$out/images/val
else
  step "the same as .ffcv files, which training reads"
  IMAGENET_DIR=$out/images WRITE_DIR=$out/ffcv WORKERS=2 train/write_imagenet.sh 32 0.50 90
  train_data=$out/ffcv/train_32_0.50_90.ffcv val_data=$out/ffcv/val_32_uncompressed.ffcv
fi

# Networks as small as these gain little from a second core: two train at a time, on half of the cores each.
step "training: FF at four sizes, MRL and MRL-E, two at a time"
train() {   # name of the run, head. Shows a line for each epoch; the tables of each size are in the run's log
  cd train
  python -u train_imagenet.py --config-file ../demo/kanji.yaml "$2" --logging.folder="$out/runs" --logging.name="$1" \
    --data.train_dataset="$train_data" --data.val_dataset="$val_data" \
    2>"$out/runs/$1.txt" | sed -un "s/^epoch/$(printf %-5s "$1") epoch/p"
  [ "${PIPESTATUS[0]}" = 0 ] || { cat "$out/runs/$1.txt" >&2; exit 255; }      # 255: xargs starts no other
}
export -f train
export out train_data val_data
OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) xargs -P 2 -L 1 bash -c 'train "$@"' train <<END
mrl --model.mrl=1
mrl_e --model.efficient=1
ff8 --model.fixed_feature=8
ff16 --model.fixed_feature=16
ff32 --model.fixed_feature=32
ff64 --model.fixed_feature=64
END

cd inference
size=(--resize 37 --crop 32 --workers 2)
images=(--data_root "$out/images" "${size[@]}")
models=("$out"/runs/{ff8,ff16,ff32,ff64,mrl,mrl_e}/final_weights.pt)
mrl=$out/runs/mrl/final_weights.pt
step "accuracy of every representation size, and what the notebooks need"
python pytorch_inference.py --path "${models[@]}" --dataset V1 "${images[@]}" --output "$out/figures" \
  --save_softmax --save_predictions --save_gt
step "robustness: brush, pixel, display and handwritten typefaces"
python pytorch_inference.py --path "${models[@]}" --dataset V1 --data_root "$out/images_odd" "${size[@]}" \
  --output "$out/figures_odd"
step "embeddings; exact, adaptive and funnel retrieval, from 8 numbers on"
python pytorch_inference.py --path "$mrl" --retrieval --dataset 1K "${images[@]}" --retrieval_array_path "$out/arrays"
cd ../retrieval
python retrieve.py report --dataset 1K --model mrl --embeddings "$out/arrays" --output "$out/retrieval" \
  --sizes 8 16 32 64 128 256
cd ..
cp "$out"/retrieval/report/1K_mrl_{report.csv,cost.png} "$out"

step "the notebooks: cascades, oracle, Grad-CAM"
notebook() {   # name, settings. A kernel is spoken to through files in its folder (ipc): of TCP it warns
  mkdir "$out/notebooks/$1"
  papermill --log-level ERROR --prepare-only "model_analysis/$1.ipynb" "$out/notebooks/$1/$1.ipynb" "${@:2}"
  export PYTHONPATH=$PWD/model_analysis${PYTHONPATH:+:$PYTHONPATH}
  cd "$out/notebooks/$1"
  jupyter nbconvert --log-level ERROR --execute --ExecutePreprocessor.startup_timeout=300 --KernelManager.transport=ipc \
    --to html "$1.ipynb" --output-dir "$out" || exit 255
}
export -f notebook
xargs -P 3 -L 1 bash -c 'notebook "$@"' notebook <<END
Model_Cascades -p folder "$out/figures" -p tta False
Oracle_Upper_Bound_Performance -p folder "$out/figures" -p tta False -y "{datasets: [V1]}"
GradCAM -p checkpoint "$mrl" -p images "$out/images/val" -p classes "$out/images/val" -p target true -p limit 8 -p resize 37 -p crop 32 -p layer stages.1
END

step "the tables and the pictures"
python demo/pictures.py "$out"
cat <<END
$out holds
  table.csv, table_odd.csv, accuracy.png      accuracy by representation size: the tables above, and a picture
  neighbours.png                              some characters and what is nearest to them at four sizes
  1K_mrl_report.csv, 1K_mrl_cost.png          adaptive and funnel retrieval: accuracy against cost
  Model_Cascades.html, GradCAM.html, Oracle_Upper_Bound_Performance.html
  images/ ffcv/ runs/ figures/ arrays/ retrieval/ notebooks/      what each step left for the next
done in $((SECONDS / 60)) min $((SECONDS % 60)) s
END
