#!/usr/bin/env bash
# One base, one budget, several ways to make a dungeon writer of it; ends with a Markdown table.
#
#   bash recipes/bakeoff.sh
#   BASE=openai-community/gpt2 RECIPE=recipes/dungeons.yaml TEACHER=openai-community/gpt2-large \
#       STEPS=100 OTHER="rooms/*.jsonl" FLAGS="--learning_rate 5e-5" bash recipes/bakeoff.sh
#
# Every setting is an environment variable. A run that is there already is not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BASE=${BASE:-artifacts/runs/demo/export}
RECIPE=${RECIPE:-recipes/dungeons_demo.yaml}
OUT=${OUT:-artifacts/bakeoff}
# The budget of each: so many steps of the recipe's batch.
STEPS=${STEPS:-200}
# Rooms from elsewhere: JSON lines with a column `text`. Without any, that row is left out.
OTHER=${OTHER:-}
# A larger model with the base's vocabulary. Without one, the best run so far stands in.
TEACHER=${TEACHER:-}
# What data.synthesize got from a large model. Without it the teacher writes as many rooms here.
WRITTEN=${WRITTEN:-}
WRITE=${WRITE:-300}
# Test rooms to predict and to write.
ROOMS=${ROOMS:-60}
NEW_TOKENS=${NEW_TOKENS:-150}
FLAGS=${FLAGS:-}
LORA_FLAGS=${LORA_FLAGS:---learning_rate 3e-3}
USD_PER_HOUR=${USD_PER_HOUR:-0}
LAUNCH=${LAUNCH:-python}

mkdir -p "$OUT"
models=("$BASE")
names="\"$BASE\": \"no fine-tuning\""

run() { # folder, name, flags of finetune.py
    local folder=$1 name=$2
    shift 2
    if [ ! -f "$OUT/$folder/finetuning.json" ]; then
        # Validated often and stopped early: the budget is a limit, not a duty.
        # shellcheck disable=SC2086
        $LAUNCH finetune.py --config "$RECIPE" --model "$BASE" --run_dir "$OUT/$folder" --max_steps "$STEPS" \
            --sample_every_steps 100000 $FLAGS "$@"
    fi
    models+=("$OUT/$folder/export")
    names+=", \"$OUT/$folder/export\": \"$name\""
}

run bundled "all weights, bundled rooms"
best=$OUT/bundled/export
if [ -n "$OTHER" ]; then
    # shellcheck disable=SC2086
    run other "all weights, bundled + other rooms" --data dungeons $OTHER --columns description=text
    best=$OUT/other/export
fi
# shellcheck disable=SC2086
run lora "LoRA, bundled rooms" --method lora --merge true $LORA_FLAGS
teacher=${TEACHER:-$best}
run distill "distilled from $teacher" --method distill --teacher "$teacher"
written=${WRITTEN:-$OUT/written.jsonl}
[ -f "$written" ] || python benchmarks/bakeoff.py write --model "$teacher" --count "$WRITE" \
    --max_new_tokens "$NEW_TOKENS" --output "$written"
run sequence "bundled rooms + rooms written by the teacher" --data dungeons "$written"

python benchmarks/bakeoff.py fit --model "$BASE" --count "$ROOMS" --max_new_tokens "$NEW_TOKENS" --output "$OUT/test.jsonl"
python eval_dungeons.py --models "${models[@]}" --data "$OUT/test.jsonl" --limit "$ROOMS" \
    --max_new_tokens "$NEW_TOKENS" --temperature 0.7 --output "$OUT/evaluation"
echo "{$names}" > "$OUT/names.json"
python benchmarks/bakeoff.py table "$OUT" --usd_per_hour "$USD_PER_HOUR" | tee "$OUT/table.md"
