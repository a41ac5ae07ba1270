#!/usr/bin/env bash
# Proves and measures the kernels on a GPU, in one call of at most nine minutes: ./launch/gpu_check.sh OUT_DIR [WHEELS_DIR]
# Needs torch, Triton and pytest; uses no network. WHEELS_DIR holds wheels of what else is missing (hydra-core, omegaconf,
# antlr4-python3-runtime, safetensors, matplotlib ...), made elsewhere with: pip wheel -w WHEELS_DIR hydra-core ...
# Every step is a process of its own with a time limit, so that one that hangs costs its own rows only. OUT_DIR gets
# summary.md, results.json (for kernels/results/DATE.json, see kernels/README.md), logs.tar.gz and report.html. PYTHON names
# the interpreter (python3).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ $# -lt 1 ]]; then
  echo "gpu_check.sh: got no argument; needs OUT_DIR [WHEELS_DIR]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$root" || exit 2
export PYTHONPATH=$root
if [[ $# -gt 1 ]]; then
  "$python" -m pip install -qq --no-index --no-deps --disable-pip-version-check --target "$out/packages" "$2"/*.whl || exit 2
  export PYTHONPATH=$root:$out/packages
fi
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check.sh: torch sees no GPU; needs one with FP8 units (H100, H200). Run launch/test.sh for what a CPU can prove." >&2
  exit 2
}

TOTAL_SECONDS=530
failed=0
summary=$out/summary.md
echo "| step | result | seconds |" >"$summary"
echo "| --- | --- | --- |" >>"$summary"

# step NAME SECONDS COMMAND...: run with a time limit, keep the log, add a row to the summary
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0 left=$((TOTAL_SECONDS - SECONDS))
  shift 2
  limit=$((limit < left ? limit : left))
  if [[ $limit -lt 5 ]]; then
    failed=1
    echo "| $name | not run: no time left | 0 |" | tee -a "$summary"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) result=passed ;;
    124 | 137) result="over its limit of $limit s" ;;
    *) result="failed with status $status" ;;
  esac
  [[ $status -eq 0 ]] || failed=1
  echo "| $name | $result | $((SECONDS - begin)) |" | tee -a "$summary"
  [[ $status -eq 0 ]] || tail -n 25 "$out/$name.log"
}

step machine 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu --format=csv
step environment 60 "$python" -c "
import json, sys, torch
from fp8train.trainer.run_folder import environment
json.dump(environment(torch.device('cuda')), open(sys.argv[1], 'w'), indent=2)" "$out/environment.json"
# correctness first: codes and scales bit for bit, then every entry of the GEMMs
step test_quantisers 90 "$python" -m pytest -q -p no:cacheprovider tests/kernels -k quantize
step test_fused 90 "$python" -m pytest -q -p no:cacheprovider tests/nn/test_fused.py tests/backends/test_fused_ops.py -k "not opcheck"
step test_gemms 120 "$python" -m pytest -q -p no:cacheprovider tests/kernels -k "gemm and not ws_128 and not gluon"
# an entry with specialised warps that is wrong may never end: each in a process of its own, all at once
entries=$("$python" -c "
from fp8train.backends.triton import kernel
names = {name for gemm in ('gemm', 'gemm_wgrad') for name in kernel(gemm).CONFIGS}
print(*sorted(name for name in names if name.startswith(('ws_', 'gluon_'))))")
for entry in $entries; do
  step "test_$entry" 90 "$python" -m pytest -q -p no:cacheprovider tests/kernels -k "gemm and $entry" &
done
wait
grep -Eq '^\| test_[^|]* \| (failed|over|not)' "$summary" && failed=1
step bench_host 30 "$python" -m fp8train.bench host out="$out/host.json"
step bench_quantize 60 "$python" -m fp8train.bench quantize rounds=15 out="$out/quantize.json"
step bench_gemm 150 "$python" -m fp8train.bench gemm rounds=11 out="$out/gemm.json"
# entries that are not in the launch table before they have been measured
for run in gluon_192x128_s4:fprop gluon_128x128_k2_s6:fprop gluon_192x128_s5:wgrad gluon_128x128_k2_s6:wgrad; do
  step "bench_${run/:/_}" 60 "$python" -m fp8train.bench gemm "backends=[triton:${run%:*}]" "gemms=[${run#*:}]" rows=[4096] \
    rounds=7 out="$out/${run/:/_}.json"
done
for size in 4096 8192; do
  step "bench_linear_$size" 45 "$python" -m fp8train.bench linear rows=8192 in_features=$size out_features=$size \
    rounds=15 out="$out/linear_$size.json"
done
layers="model=llama3_8b model.num_layers=4 experiment=null seq_len=4096 global_batch_tokens=8192 activation_checkpointing=none"
# shellcheck disable=SC2086
step bench_step_eager 90 "$python" -m fp8train.bench step $layers rounds=9 out="$out/step_eager.json"
# shellcheck disable=SC2086
step bench_step_compiled 120 "$python" -m fp8train.bench step $layers compile=true rounds=9 out="$out/step_compiled.json"
# shellcheck disable=SC2086
step bench_step_fused 60 "$python" -m fp8train.bench step $layers baseline=unfused rounds=9 out="$out/step_fused.json"
step train 90 "$python" -m fp8train.compare experiment=quickstart steps=100 run_dir="$out/compare"

cp "$out/compare/verdict.json" "$out/compare/report.html" "$out/" 2>/dev/null
# one file of figures and one of logs
"$python" - "$out" <<'END' && (cd "$out" && tar -czf logs.tar.gz -- *.log && rm -f -- *.log)
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = sorted(path for path in out.glob("*.json") if path.name != "results.json")
content = {path.stem: json.loads(path.read_text()) for path in parts} | {"machine": (out / "machine.log").read_text()}
(out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
for path in parts:
    path.unlink()
END
rm -rf "$out/packages" "$out/compare"
cat "$summary"
exit $failed
