#!/usr/bin/env bash
# The whole recipe on a CPU: environment, SFT, DPO, export, a short chat, and a page of curves.
#   bash launch/quickstart.sh            four to six minutes on two cores after installation
# PYTHON chooses the interpreter (3.11 or later); RUNS the output folder (default runs).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
RUNS="${RUNS:-runs}"
VENV=.venv

if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e .
started=$(date +%s)

run() { echo; echo "== $1"; shift; "$VENV/bin/python" -m "$@"; }

export JAX_PLATFORMS=cpu
SFT=(--gin_file=tulu_tiny_sft.gin --workdir="$RUNS/tulu_tiny_sft")
DPO=(--gin_file=tulu_tiny_dpo.gin --workdir="$RUNS/tulu_tiny_dpo" "--gin.BASE=\"$RUNS/tulu_tiny_sft\"")

run "Prepare: raw rows to packed tokens" tulu_jax.prepare "${SFT[@]}"
run "Held-out exact match before training" tulu_jax.evaluate "${SFT[@]}" --initial
run "Supervised fine-tuning" tulu_jax.train "${SFT[@]}"
run "Held-out exact match and style after SFT" tulu_jax.evaluate "${SFT[@]}"
run "DPO from that checkpoint" tulu_jax.train "${DPO[@]}"
run "Held-out exact match and style after DPO" tulu_jax.evaluate "${DPO[@]}"
run "Export to Hugging Face layout" tulu_jax.convert "${DPO[@]}" --out="$RUNS/tulu_tiny_hf" --overwrite
run "A short chat" tulu_jax.generate "${DPO[@]}" --max_new_tokens=32 \
  --prompt="Opposite of hot?" --prompt="Reverse: cat red fox" --prompt="Which is larger, 7 or 12?"
run "Summary" tulu_jax.report --workdirs="$RUNS/tulu_tiny_sft,$RUNS/tulu_tiny_dpo" --out="$RUNS/report.html"
echo
echo "Done in $(( $(date +%s) - started )) s after installation. Curves: $RUNS/report.html"
echo "Chat: $VENV/bin/python -m tulu_jax.generate ${DPO[*]@Q}"
