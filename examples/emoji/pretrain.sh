#!/bin/sh
# Pre-train the embedded model at 128 pixels, whole or from where it was stopped:
#
#     sh examples/emoji/pretrain.sh runs/emoji128
#
# A stage that is finished is left out. PYTHON, START and UNET_STEPS may be set. START is the folder of
# the first embedded model, of 64 pixels, whose weights VAE and text encoder then begin with (README.md
# says where it is). To end the UNet's training early, run again with fewer UNET_STEPS: the learning
# rate falls over the last 15 % of them.
set -e
run=$1
here=$(dirname "$0")
python=${PYTHON:-python}

done_already() { test -f "$run/$1"; }

done_already captions.csv || $python "$here/build_dataset.py" --out "$run" --size 128
done_already vae/config.json ||
    $python "$here/train_vae.py" --run "$run" ${START:+--start "$START"} --steps "${VAE_STEPS:-6000}" --batch 24
done_already text_encoder/config.json ||
    $python "$here/train_text_encoder.py" --run "$run" ${START:+--start "$START"} --steps 400 --rate 5e-4
$python "$here/train_unet.py" --run "$run" --steps "${UNET_STEPS:-60000}" --average 0.9995
$python "$here/train_vae.py" --run "$run" --steps "${DECODER_STEPS:-6000}" --batch 24 --decoder-only
