# Settings of every job on this cluster, sourced by slurm/job.sh on the node that runs the batch script; srun hands them
# to all nodes. Each can be set before `sbatch` instead.

# --- where things are
export ASYPPO_PYTHON=${ASYPPO_PYTHON:-.venv/production/bin/python}  # an interpreter that every node sees
export ASYPPO_CONTAINER=${ASYPPO_CONTAINER:-}  # an image for pyxis/enroot; empty: no container
export ASYPPO_MOUNTS=${ASYPPO_MOUNTS:-$PWD:$PWD}  # of the container: the project, and where models and runs are
export ASYPPO_PORT=${ASYPPO_PORT:-$((20000 + SLURM_JOB_ID % 10000))}  # of the run's store on the first node
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# --- processes
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # several ranks share a node: more threads each only fight over the cores
export TOKENIZERS_PARALLELISM=false  # its threads do not survive the forks of the rollout driver
export HF_HUB_OFFLINE=1  # models are directories; a compute node without network must not wait for one
export PYTHONUNBUFFERED=1  # what a job said before it was killed is in its log
ulimit -n "$(ulimit -Hn)"  # a world has many connections: 1,024 files a process are soon gone
ulimit -c 0  # a core file of a rank is as large as its memory

# --- Megatron on CUDA
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # tensor parallelism: communication is queued before
# the matrix product it overlaps only where kernels run in the order of their launch

# --- NCCL, which is to fail rather than hang, and to say where
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # its own reason for an error, not torch's summary of it
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a collective that failed or timed out ends its rank
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # and its last collectives go to a file first (torch's flight recorder),
export TORCH_FR_BUFFER_SIZE=2000  # so many of them;
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}  # also where its own watchdog is stuck
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}  # a link that flaps for a minute is no reason to lose a step (4 us * 2^22)
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}  # NVLink SHARP buffers cost memory for each group, and roles make many
# A cluster with several networks names the one between nodes:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
