# shellcheck shell=bash
# What every host sets before qlog starts: sourced by launch/supervise and launch/slurm.sbatch.
# Edit it freely; it holds no secrets itself, it reads them from files.

# One file per secret: hf_token, wandb_api_key. A Kubernetes secret is mounted as /secrets.
secrets=${QLOG_SECRETS:-/secrets}
if [ -r "$secrets/hf_token" ]; then
    export HF_TOKEN_PATH="$secrets/hf_token" # huggingface_hub reads the file itself.
fi
if [ -r "$secrets/wandb_api_key" ]; then
    WANDB_API_KEY=$(<"$secrets/wandb_api_key")
    export WANDB_API_KEY
fi

export PYTHONUNBUFFERED=1

# Programs compiled by one host or an earlier try are found by the next. qlog keeps them in a local
# folder by itself; a bucket serves machines that come and go.
# export JAX_COMPILATION_CACHE_DIR=gs://bucket/xla

# JAX 0.8.1 moved the coordinator's port from 8476 to 8482; name the one your firewall lets through.
# export JAX_COORDINATOR_PORT=8476

# Compiler options that you measured to help; none is set by default.
# export LIBTPU_INIT_ARGS=...
