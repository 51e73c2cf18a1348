#!/usr/bin/env bash
# SSAPO with ranks and engines placed by Ray: on the cluster of RAY_ADDRESS, or in a private session on this machine without it.
#   bash examples/train_ssapo_ray.sh --config zephyr-7b.paper --ckpt.output_dir /data/zephyr
#   RAY_ADDRESS=10.0.0.1:6379 bash examples/train_ssapo_ray.sh --config zephyr-7b.paper --ckpt.output_dir /data/zephyr
set -eu
exec openrlhf-sgpo train --launcher ray "$@"
