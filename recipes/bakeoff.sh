#!/usr/bin/env bash
# One base, one budget, several ways to make a dungeon writer of it; ends with a Markdown table.
#
#   bash recipes/bakeoff.sh
#   BASE=openai-community/gpt2 RECIPE=recipes/dungeons.yaml TEACHER=openai-community/gpt2-large \
#       STEPS=100 OTHER="rooms/*.jsonl" FLAGS="--learning_rate 5e-5" bash recipes/bakeoff.sh
#
# Every setting is an environment variable. A run that is there already is not run again; a folder that was
# begun with other settings is refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BASE=${BASE:-artifacts/runs/demo/export}
RECIPE=${RECIPE:-recipes/dungeons_demo.yaml}
OUT=${OUT:-artifacts/bakeoff}
# The budget of each: so many steps of the recipe's batch.
STEPS=${STEPS:-200}
# Rooms from elsewhere: JSON lines with a column `text`. Without any, that row is left out.
OTHER=${OTHER:-}
# A larger model with the base's vocabulary. Without one, the best run so far stands in, and its minutes count.
TEACHER=${TEACHER:-}
# What data.synthesize got from a large model. Without it the teacher writes as many rooms here.
WRITTEN=${WRITTEN:-}
WRITE=${WRITE:-300}
# Test rooms to predict and to write.
ROOMS=${ROOMS:-60}
NEW_TOKENS=${NEW_TOKENS:-150}
FLAGS=${FLAGS:-}
LORA_FLAGS=${LORA_FLAGS:---learning_rate 3e-3}
# Of this machine. Without it the table has no money.
USD_PER_HOUR=${USD_PER_HOUR:-}
LAUNCH=${LAUNCH:-python}

mkdir -p "$OUT"
settings=$(
    for name in BASE RECIPE STEPS OTHER TEACHER WRITTEN WRITE ROOMS NEW_TOKENS FLAGS LORA_FLAGS; do
        echo "$name=${!name}"
    done
    cksum "$RECIPE" data/corpora/dungeons/*.jsonl
)
if [ -f "$OUT/settings.txt" ] && ! diff "$OUT/settings.txt" - <<< "$settings" >&2; then
    echo "bakeoff.sh: $OUT was begun with other settings (< then, > now), and a table must not mix them." >&2
    echo "Give the old ones, another OUT, or remove the folder." >&2
    exit 1
fi
echo "$settings" > "$OUT/settings.txt"

models=("$BASE")
# A line for each row of the table: its model, its name, and the files that say how long it took.
printf '%s\t%s\t\n' "$BASE" "no fine-tuning" > "$OUT/rows.tsv"

run() { # folder, name, what else took its time, flags of finetune.py
    local folder=$1 name=$2 before=$3
    shift 3
    if [ ! -f "$OUT/$folder/finetuning.json" ]; then
        # Validated often and stopped early: the budget is a limit, not a duty.
        # shellcheck disable=SC2086
        $LAUNCH finetune.py --config "$RECIPE" --model "$BASE" --run_dir "$OUT/$folder" --max_steps "$STEPS" \
            --sample_every_steps 100000 $FLAGS "$@"
    fi
    models+=("$OUT/$folder/export")
    printf '%s\t%s\t%s\n' "$OUT/$folder/export" "$name" "$folder/metrics.jsonl $before" >> "$OUT/rows.tsv"
}

run bundled "all weights, bundled rooms" ""
best=bundled
if [ -n "$OTHER" ]; then
    # shellcheck disable=SC2086
    run other "all weights, bundled + other rooms" "" --data dungeons $OTHER --columns description=text
    best=other
fi
# shellcheck disable=SC2086
run lora "LoRA, bundled rooms" "" --method lora $LORA_FLAGS
if [ -n "$TEACHER" ]; then
    teacher=$TEACHER taught="" # others trained it
else
    teacher=$OUT/$best/export taught=$best/metrics.jsonl
fi
run distill "distilled from $teacher" "$taught" --method distill --teacher "$teacher"
written=${WRITTEN:-$OUT/written.jsonl}
[ -f "$written" ] || python benchmarks/bakeoff.py write --model "$teacher" --count "$WRITE" \
    --max_new_tokens "$NEW_TOKENS" --output "$written" --metrics "$OUT/written.metrics.jsonl"
if [ -n "$WRITTEN" ]; then taught=""; else taught="$taught written.metrics.jsonl"; fi
run sequence "bundled rooms + rooms written by the teacher" "$taught" --data dungeons "$written"

python benchmarks/bakeoff.py fit --model "$BASE" --count "$ROOMS" --max_new_tokens "$NEW_TOKENS" --output "$OUT/test.jsonl"
python eval_dungeons.py --models "${models[@]}" --data "$OUT/test.jsonl" --limit "$ROOMS" \
    --max_new_tokens "$NEW_TOKENS" --temperature 0.7 --output "$OUT/evaluation"
python benchmarks/bakeoff.py table "$OUT" ${USD_PER_HOUR:+--usd_per_hour "$USD_PER_HOUR"} | tee "$OUT/table.md"
