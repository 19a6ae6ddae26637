#!/usr/bin/env bash
# Measure the embedded pair again, after its weights have changed: bash benchmarks/embedded_pair.sh PROMPTS [PART...]
#
# PROMPTS is a directory with humaneval.jsonl, gsm8k.jsonl and mt_bench.jsonl (JSON lines with turns). Without parts all
# are run, those that measure time first: they need an otherwise idle machine. Then `python -m benchmarks.tables` writes
# the tables; the figures in sentences of README and docs, notebooks (`python -m notebooks.run`), and the table of
# docs/evaluate.md for lm-eval are made by hand.
set -euo pipefail
prompts=$(realpath "${1:?expected a directory of prompts}")
shift
cd "$(dirname "$0")/.."
results=benchmarks/results
human_eval=$prompts/humaneval.jsonl gsm8k=$prompts/gsm8k.jsonl mt_bench=$prompts/mt_bench.jsonl
timed="speculation auto overhead compile budget_speed against_transformers tune_check drafters bench tune"
untimed="tokens acceptance auto_replay divergence int8_quality budget_quality figures round study evaluate tree_60"

# Run an example of docs in a directory of its own, and keep the files that docs show.
example() {
  local name=$1 files=$2 made
  shift 2
  made=$(mktemp -d)
  python -m "$@" --output "$made"
  for file in $files; do cp "$made"/$file "docs/examples/$name/"; done
}

for part in ${*:-$timed $untimed}; do
  echo "== $part"
  case $part in
    speculation) python -m benchmarks.speculation --repeats 5 --prompts 8 --out $results ;;
    auto)
      python -m benchmarks.auto --count 3 --seconds 330 --prompts "HumanEval=$human_eval" --prompts "GSM8K=$gsm8k" \
        --out $results
      ;;
    overhead) python -m benchmarks.auto --part overhead --count 3 --tokens 192 --repeats 15 --out $results ;;
    compile) python -m benchmarks.auto --part compile --out $results ;;
    budget_speed) python -m benchmarks.budget_speed --trees 4/2/1 60/7/10 --prompts 5 --out $results ;;
    against_transformers) python -m benchmarks.against_transformers --output $results/against_transformers.json ;;
    tune_check) python -m benchmarks.tune_check --prompts 6 --out $results ;;
    drafters)
      python -m benchmarks.drafters --prompts "humaneval=$human_eval" --prompts "gsm8k=$gsm8k" \
        --prompts "mt_bench=$mt_bench" --out $results
      ;;
    bench) example bench "bench.jsonl bench.md bench.png" moespec_jax.bench ;;
    tune)
      example tune "profile.json tune.md tune.png" moespec_jax.tune --count 4 --tokens 48 --tree-top-ks 1 \
        --budgets 0.5 --repeats 3
      ;;
    tokens) python -m benchmarks.gpu --reference $results/embedded_tokens.json ;;
    acceptance) python -m benchmarks.acceptance --count 24 --prompts "HumanEval=$human_eval" --out $results ;;
    auto_replay)
      python -m benchmarks.auto_replay --prompts "HumanEval=$human_eval" --prompts "GSM8K=$gsm8k" --out $results
      ;;
    divergence) python -m benchmarks.divergence --count 48 --out $results ;;
    int8_quality) python -m benchmarks.int8_quality --out $results ;;
    budget_quality) python -m benchmarks.budget_quality --texts 12 --tokens 96 --out $results ;;
    figures) python -m benchmarks.budget_figures --out docs ;;
    round) python -m benchmarks.round_figure --out docs/round.png ;;
    study)
      example study "*.csv *.png study.html" moespec_jax.study --rules all --timed few --timed-budgets 8 16 --count 24 \
        --prompts held-out --prompts "humaneval=$human_eval" --prompts "gsm8k=$gsm8k"
      ;;
    evaluate) example evaluate "evaluate.jsonl evaluate.md evaluate.png" moespec_jax.evaluate ;;
    tree_60)
      example evaluate/tree-60 "evaluate.jsonl evaluate.md evaluate.png" moespec_jax.evaluate --prompts held-out \
        --answers docs/examples/evaluate/code.jsonl --run-code --answer-tokens 32 --tree-size 60 --tree-depth 7 \
        --tree-top-k 10 --expert-budget 8 --expert-budget 16
      ;;
    *) echo "expected parts of: $timed $untimed; got $part" >&2 && exit 2 ;;
  esac
done
