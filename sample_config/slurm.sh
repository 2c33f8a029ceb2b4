#!/bin/bash
# Pretraining on several machines under SLURM: sbatch config/slurm.sh, or for our recipe
# sbatch config/slurm.sh config/best.py --out_dir=out/base+best. One machine suffices for base.py. Edit
# the paths, and the lines above "set". SLURM sends SIGTERM 120 s before the time is up: the run saves and ends,
# and this script queues itself again. If a rank fails, torchrun starts all ranks from the last
# checkpoint, which costs at most save_interval steps. Not tried on a cluster yet.
#SBATCH --job-name=polarbert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=polarbert_%j.log
set -eu
. .venv/bin/activate
export OMP_NUM_THREADS=4
# without it, restarted ranks find the addresses of dead ones
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

out_dir=out/base
for arg in "$@"; do
    case $arg in --out_dir=*) out_dir=${arg#--out_dir=} ;; esac
done
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
last_step() { tail -n 1 "$out_dir/log.csv" 2>/dev/null | cut -d, -f1; }
before=$(last_step)

# data/ and out/ must be on a disk that all machines share
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max_restarts=3 --shutdown_timeout=100 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head_node:29500" \
    train.py config/base.py --out_dir="$out_dir" "$@" || echo "torchrun ended with status $?"

# queue it again if it made a step: a complete run makes none, nor does one that fails at its start
if [ "$(last_step)" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
