#!/usr/bin/env bash
# Trains on every GPU of this machine (one process on a CPU): ./launch/torchrun.sh experiment=llama3_8b data=tokens data.path=...
# Several machines: set NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) alike on each; slurm.sbatch does.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

rendezvous=(--standalone)
if [[ ${NNODES:-1} -gt 1 ]]; then
  : "${MASTER_ADDR:?set it to the address of the first machine}" "${NODE_RANK:?set it to 0 on the first machine, 1 on the next}"
  port=${MASTER_PORT:-29500}
  if [[ $NODE_RANK -eq 0 ]] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    fail "port $port is in use on this machine; needs a free one. Set MASTER_PORT to another, alike on every machine."
  fi
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
fi
install_package ""
processes=${NPROC_PER_NODE:-$("$venv_python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
# Torchrun hands a signal to the ranks, which finish their step and save; by default not SIGUSR1, and kills them 30 s later.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec "$venv_python" -m torch.distributed.run "${rendezvous[@]}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
  --nproc-per-node "$processes" -m fp8train.train "$@"
