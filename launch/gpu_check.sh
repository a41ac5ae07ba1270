#!/usr/bin/env bash
# Proves and measures the kernels on a GPU, in one call of at most nine minutes: ./launch/gpu_check.sh OUT_DIR [WHEELS_DIR]
# Needs torch, Triton and pytest; uses no network. WHEELS_DIR holds wheels of what else is missing (hydra-core, omegaconf,
# antlr4-python3-runtime, safetensors, pytest-xdist, execnet ...), made elsewhere: pip wheel -w WHEELS_DIR ...
# Every step is a process of its own with a time limit, so that one that hangs costs its own rows only. OUT_DIR gets
# summary.md, results.json (for kernels/results/DATE.json, see kernels/README.md), logs.tar.gz and report.html. PYTHON names
# the interpreter (python3). PARTS="benches entries tests" says what to do, all by default; TOTAL_SECONDS how long at most.
# First of all every kernel is proven by its check of first use, which decides whether it is measured at all; the tests
# prove more and come last, since all of it hardly fits into one call: what is cut off, PARTS=tests makes up for.
# Most of the time is the compilers': OUT_DIR/compiled.tar.xz holds what they made, and COMPILED names that of an earlier
# call, on such a machine with these versions, for what has not changed since. It is unpacked where it was made, below
# TMPDIR (/tmp): Triton finds its files by their absolute paths.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ $# -lt 1 ]]; then
  echo "gpu_check.sh: got no argument; needs OUT_DIR [WHEELS_DIR]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
compiled=$(realpath -m -- "${COMPILED:-$out/compiled.tar.xz}")
cd "$root" || exit 2
cache=${TMPDIR:-/tmp}/fp8train-compiled
export PYTHONPATH=$root TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor
mkdir -p "$cache"
[[ -O $cache ]] || {
  echo "gpu_check.sh: $cache belongs to another user; needs to be yours, since code is run from it. Set TMPDIR." >&2
  exit 2
}
if [[ -n ${COMPILED:-} ]]; then
  tar -xf "$compiled" -C "$cache" || exit 2
fi
if [[ $# -gt 1 ]]; then
  "$python" -m pip install -qq --no-index --no-deps --disable-pip-version-check --target "$out/packages" "$2"/*.whl || exit 2
  export PYTHONPATH=$root:$out/packages
fi
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check.sh: torch sees no GPU; needs one with FP8 units (H100, H200). Run launch/test.sh for what a CPU can prove." >&2
  exit 2
}

TOTAL_SECONDS=${TOTAL_SECONDS:-530}
PARTS=" ${PARTS:-benches entries tests} "
CORES=$(nproc)
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

# tests NAME SECONDS WORKERS ARGUMENTS...: pytest over several processes, where pytest-xdist is there
xdist=$("$python" -c 'import importlib.util as u; print(int(u.find_spec("xdist") is not None))')
tests() {
  local name=$1 limit=$2 workers=$3 parallel=()
  shift 3
  [[ $xdist -eq 0 || $workers -lt 2 ]] || parallel=(-n "$workers" --dist worksteal)
  step "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --tb=short "${parallel[@]}" "$@"
}

step machine 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu --format=csv
step environment 60 "$python" -c "
import json, sys, torch
from fp8train.trainer.environment import environment
json.dump(environment(torch.device('cuda')), open(sys.argv[1], 'w'), indent=2)" "$out/environment.json"

by_hand() { # OPERATION PREFIX: its entries with specialised warps, PREFIX before each, by commas
  "$python" -c "
import sys
from fp8train.backends.triton import kernel
operation, prefix = sys.argv[1:]
print(*(prefix + name for name in kernel(operation).CONFIGS if name.startswith(('ws_', 'gluon_'))), sep=',')" "$@"
}
# Correctness first, codes bit for bit and GEMMs against FP64; by itself, since what follows reads its verdicts. A
# process for each kernel, of which one that hangs ends after 90 s.
step admission 240 "$python" -m fp8train.backends --all --seconds 90

# Four layers of the 8b shape; with its own vocabulary the head, in BF16 in both arms, would take a third of the time.
# Four micro-batches of 8,192 tokens, as in a run that accumulates.
layers=(model=llama3_8b model.num_layers=4 model.vocab_size=8192 experiment=null seq_len=4096 global_batch_tokens=32768
  micro_batch_samples=2 activation_checkpointing=none)
# Then the time, on a quiet GPU: the benches start together, which hides their imports, and take turns with the lock.
bench() { # NAME SECONDS ARGUMENTS...: the limit counts from its turn
  local name=$1 limit=$2
  shift 2
  step "bench_$name" "$TOTAL_SECONDS" "$python" -m fp8train.bench "$@" lock="$out/turn" limit_seconds="$limit" out="$out/$name.json" &
}
benches() {
  bench quantize 60 quantize plain=true rounds=15
  bench gemm 90 gemm rounds=9
  bench adding 60 gemm "gemms=[wgrad]" accumulate=true rounds=9 # as from the second micro-batch on
  for size in 4096 8192; do
    bench "linear_$size" 45 linear rows=8192 in_features=$size out_features=$size rounds=15
  done
  bench step_eager 60 step "${layers[@]}" profile=true rounds=7
  bench step_one_copy 60 step "${layers[@]}" weight_copies=one rounds=7
  wait
  bench step_compiled 150 step "${layers[@]}" compile=true profile=true rounds=7 # by itself: it compiles long
  wait
  step bench_host 30 "$python" -m fp8train.bench host out="$out/host.json"
}
entries() { # of the GEMMs, whether the launch table has them or not, in turn
  local operation gemms each
  bench entries 60 entries # the rates of gemm_table.py
  for operation in gemm_wgrad gemm; do
    gemms=$([[ $operation == gemm ]] && echo fprop,dgrad || echo wgrad)
    each=("backends=[cublaslt,$(by_hand "$operation" triton:)]" "gemms=[$gemms]" rounds=7)
    bench "each_$operation" 90 gemm "${each[@]}"
    [[ $operation == gemm ]] || bench each_adding 40 gemm "${each[@]}" accumulate=true
  done
  wait
}
more_benches() { # what says least new, last
  bench step_large 60 step "${layers[@]}" micro_batch_samples=8 rounds=5 # one of 32,768 tokens: its activations count
  bench step_fused 60 step "${layers[@]}" baseline=unfused rounds=5
  wait
}
[[ $PARTS != *" benches "* ]] || benches
[[ $PARTS != *" entries "* ]] || entries
[[ $PARTS != *" benches "* ]] || more_benches

# An entry with specialised warps that is wrong may never end, so each is in a process of its own. What trains needs no
# quiet GPU. All of it compiles: started beside the admission too, on 16 cores, nearly all of it was over its limit
# (H200, 2026-11-27).
all_tests() {
  local share=$((CORES > 8 ? CORES / 4 : 2)) entry
  tests test_quantisers 200 "$share" tests/kernels -k "(quantize or norm or transpose) and not swiglu and not rmsnorm_quantize and not compile" &
  tests test_producers 200 "$share" tests/kernels -k "(swiglu or rmsnorm_quantize) and not compile" &
  tests test_gemms 200 "$share" tests/kernels -k "gemm and not compile and not ws_128 and not gluon" &
  tests test_rope 200 "$share" tests/kernels/test_rope.py tests/nn/test_fused_rope.py -k "not compile" &
  tests test_fused 200 "$share" tests/nn/test_fused.py tests/backends/test_fused_ops.py -k "not opcheck" &
  tests test_backends 200 "$share" tests/backends/test_triton.py tests/backends/test_gpu_backends.py tests/nn/test_linear.py &
  tests test_sharding 200 1 tests/distributed/test_sharding.py tests/trainer/test_step_memory.py &
  for entry in $({ by_hand gemm "" && by_hand gemm_wgrad ""; } | tr , '\n' | sort -u); do
    tests "test_$entry" 120 1 tests/kernels -k "gemm and $entry" &
  done
  step train 150 "$python" -m fp8train.compare experiment=quickstart steps=100 run_dir="$out/compare" &
  wait
}
[[ $PARTS != *" tests "* ]] || all_tests
# what ran in the background could not set `failed`
grep -Eq '^\| [^|]* \| (failed|over|not)' "$summary" && failed=1
rm -f "$out/turn"

cp "$out/compare/verdict.json" "$out/compare/report.html" "$out/" 2>/dev/null
# one file of figures, one of logs, one of compiled code
"$python" - "$out" <<'END' && (cd "$out" && tar -czf logs.tar.gz -- *.log && rm -f -- *.log)
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = sorted(path for path in out.glob("*.json") if path.name != "results.json")
content = {"machine": (out / "machine.log").read_text()}
for path in parts:
    try:
        content[path.stem] = json.loads(path.read_text())
    except ValueError as error:  # a step that was ended while it wrote: the others count
        print(f"{path.name}: left out, {error}", file=sys.stderr)
        continue
    path.unlink()
(out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
END
XZ_OPT="-3 -T0" tar -cJf "$out/compiled.tar.xz" -C "$cache" . || rm -f "$out/compiled.tar.xz" # tar says why
rm -rf "$out/packages" "$out/compare"
cat "$summary"
exit $failed
