#!/usr/bin/env bash
# The whole idea on 5,000 real images, on any machine: images -> .ffcv -> checkpoints -> accuracy, embeddings -> pictures.
#
#   ./demo.sh [FOLDER=demo_out]        4 minutes on 2 CPU cores after the set-up
#
# Every step below is a script that a user of ImageNet runs too; demo/digits.yaml makes the training small.
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

step "the digits as an ImageNet-style folder tree, then as .ffcv files"
rm -rf "$out"/{images,ffcv,runs,figures,arrays,retrieval,outputs}
mkdir -p "$out/figures"
python demo/prepare.py "$out/images"
IMAGENET_DIR=$out/images WRITE_DIR=$out/ffcv WORKERS=2 train/write_imagenet.sh 32 0.50 90

train() {   # name of the run, head
  step "training $1"
  (cd train && python train_imagenet.py --config-file ../demo/digits.yaml "$2" --logging.folder="$out/runs" \
    --logging.name="$1" --data.train_dataset="$out/ffcv/train_32_0.50_90.ffcv" \
    --data.val_dataset="$out/ffcv/val_32_uncompressed.ffcv")
}
train ff2 --model.fixed_feature=2
train ff8 --model.fixed_feature=8
train ff64 --model.fixed_feature=64
train mrl --model.mrl=1
train mrl_e --model.efficient=1

cd inference
images=(--data_root "$out/images" --resize 27 --crop 24 --workers 2)
step "accuracy of every representation size"
python pytorch_inference.py --path "$out"/runs/{ff2,ff8,ff64,mrl,mrl_e}/final_weights.pt --dataset V1 \
  "${images[@]}" --output "$out/figures"
step "embeddings"
python pytorch_inference.py --path "$out/runs/mrl/final_weights.pt" --retrieval --dataset 1K "${images[@]}" \
  --retrieval_array_path "$out/arrays"
cd ..

step "exact, adaptive and funnel retrieval"
(cd retrieval && python retrieve.py report --dataset 1K --model mrl --embeddings "$out/arrays" --output "$out/retrieval")
cp "$out"/retrieval/report/1K_mrl_{report.csv,cost.png} "$out"

step "the notebooks: cascades, oracle, Grad-CAM"
(cd inference && python pytorch_inference.py --path "$out/runs/mrl/final_weights.pt" --dataset V1 "${images[@]}" \
  --output "$out/outputs" --save_softmax --save_predictions --save_gt)
notebook() {   # name, settings
  (cd model_analysis && papermill --log-level ERROR --start-timeout 300 "$1.ipynb" "$out/outputs/$1.ipynb" "${@:2}" \
    && jupyter nbconvert --log-level ERROR --to html "$out/outputs/$1.ipynb" --output-dir "$out")
}
notebook Model_Cascades -p folder "$out/outputs" -p tta False
notebook Oracle_Upper_Bound_Performance -p folder "$out/outputs" -p tta False -y "{datasets: [V1]}"
notebook GradCAM -p checkpoint "$out/runs/mrl/final_weights.pt" -p images "$out/images/val" \
  -p classes "$out/images/val" -p target true -p limit 8 -p resize 27 -p crop 24 -p layer layer2

step "the table and the pictures"
python demo/pictures.py "$out"
