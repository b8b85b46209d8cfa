#!/usr/bin/env bash
# One run on all workers of a TPU pod, which is created if it is not there. From the root of the repository:
#
#   TPU=flair ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite scripts/tpu_pod.sh \
#       --config configs/flair_cc3m.py --workdir gs://bucket/run --config.data.shards='gs://bucket/cc3m/{00000..00575}.tar'
#
# The commit that is checked out is copied and installed on every worker. A preemptible pod (SPOT=1, the default; SPOT=
# for another) that is taken away is made again, and the run goes on from its newest checkpoint; so does the same command
# after any other end. The pod stays when the run is done:  gcloud compute tpus tpu-vm delete $TPU --zone $ZONE
set -euo pipefail
: "${TPU:?name of the pod}" "${ZONE:?}" "${TYPE:?accelerator type}" "${VERSION:?runtime version}"

spot=()
[[ -z ${SPOT-1} ]] || spot=(--spot)
tpu() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$ZONE"; }
state() { tpu describe "$TPU" --format 'value(state)' 2>/dev/null || true; }

prepare() {
  case $(state) in
    READY) ;;
    "") tpu create "$TPU" --accelerator-type "$TYPE" --version "$VERSION" ${spot[@]+"${spot[@]}"} ;;
    *) tpu delete "$TPU" --quiet && prepare && return ;;
  esac
  local archive
  archive=$(mktemp -d)/flair.tar.gz
  git archive --output "$archive" HEAD
  tpu scp "$archive" "$TPU:" --worker=all
  tpu ssh "$TPU" --worker=all --command "mkdir -p flair && tar -xzf flair.tar.gz -C flair && cd flair \
    && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 \
    && python3 -m uv pip install --quiet -e '.[tpu,remote]'"
}

while true; do
  prepare
  status=0
  tpu ssh "$TPU" --worker=all --command "cd flair && .venv/bin/python -m flair_jax.main --distributed ${*@Q}" || status=$?
  [[ $status != 0 && $(state) != READY ]] || break
  echo "the pod was taken away; the run goes on on a new one" >&2
done
if [[ $status != 0 ]]; then
  echo "the run ended with status $status; the same command goes on from its newest checkpoint" >&2
fi
exit "$status"
