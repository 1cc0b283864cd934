# shellcheck shell=bash
# What every host sets before qlog starts: sourced by launch/supervise and launch/slurm.sbatch.
# Edit it freely. What the caller or the pod's environment has set already is left as it is, so an
# image need not be built again for it. It holds no secrets itself, it reads them from files.

# One file: hf_token. A Kubernetes secret is mounted as /secrets.
secrets=${QLOG_SECRETS:-/secrets}
if [ -r "$secrets/hf_token" ]; then
    export HF_TOKEN_PATH="$secrets/hf_token" # huggingface_hub reads the file itself.
fi

export PYTHONUNBUFFERED=1

# Set by the launchers:
#   QLOG_ASSETS     the folder or bucket that launch/stage filled (--assets)
#   JAX_PLATFORMS   tpu,cpu or cuda,cpu: JAX fails where the accelerator does, rather than go on
#                   on the CPU
#   JAX_COMPILATION_CACHE_DIR   --compile-cache: programs compiled by an earlier try, where machines
#                   come and go. Compiled programs are run as they are: whoever may write there
#                   runs code on all hosts.

# JAX 0.8.1 moved the coordinator's port from 8476 to 8482; name the one your firewall lets through.
# export JAX_COORDINATOR_PORT=8476

# Compiler options that you measured to help; none is set by default.
# export LIBTPU_INIT_ARGS=...

# qlog refuses what cannot fit into the memory that a device has, or its host. Where it takes that
# for less than there is, say the bytes of one device, or of this host, here.
# export QLOG_MEMORY=64e9
# export QLOG_HOST_MEMORY=512e9

# NVIDIA GPUs. None of these was measured with qlog.
# export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92  # JAX takes 0.75 of the memory by default
# export XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_enable_latency_hiding_scheduler=true"  # collectives during compute
# export NCCL_DEBUG=WARN
# export NCCL_SOCKET_IFNAME=eth0              # the network between nodes, where NCCL picks another
# export NCCL_IB_HCA=mlx5                     # InfiniBand adapters to use
