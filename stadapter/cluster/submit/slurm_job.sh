#!/bin/bash -l
@HEADERS@

@FACTS@

# The signals to this script:
#   USR1  from Slurm, before the time limit or at a pre-emption: checkpoints, then back into the queue
#   USR2  from `stadapter submit stop`: checkpoints, then the end, also after a USR1
#   TERM  from Slurm, to every process of a cancelled job: the driver has got it as well
# The driver is signalled once, however many signals come: a second one would cut it off.
asked='' interrupted='' driver='' told='' head='' workers='' ready=''
tell_driver() {
    if [ -n "$driver" ] && [ -z "$told" ]; then
        told=yes
        kill -USR1 "$driver"
    fi
}
ask() {
    interrupted=yes
    if [ -z "$asked" ] || [ "$1" = USR2 ]; then asked=$1; fi
    if [ "$1" != TERM ]; then tell_driver; elif [ -n "$driver" ]; then told=yes; fi
}
trap 'ask USR1' USR1
trap 'ask USR2' USR2
trap 'ask TERM' TERM
fail() { echo "error: $1" >&2; exit 1; }

folder=@FOLDER@
rm -f "$folder/ended"
trap 'echo "$?" > "$folder/ended"' EXIT
@SECRETS@
# Before `set -u`, under which many modules and environments fail.
@SETUP@
python=@PYTHON@
@EXPORTS@
set -u
cd "$folder/code" || fail "$folder/code is not there"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export SLURM_EXPORT_ENV=ALL # the steps of this job get the environment of this script

# Ray's token lies in a folder of the job that only its user can read, and is deleted with the job's end.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/private/token" RAY_USAGE_STATS_ENABLED=0
scratch=/tmp/stadapter-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
clean_up() {
    trap '' USR1 USR2 TERM
    for process in $workers $head $ready; do kill "$process" 2> /dev/null; done
    wait
    rm -rf "$scratch" "$folder/private"
}
trap 'code=$?; clean_up; echo "$code" > "$folder/ended"' EXIT
rm -rf "$folder/private"
mkdir -m 700 "$folder/private" || fail "$folder cannot be written"
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH") ||
    fail "$python does not run on $HOSTNAME"

# The address at which the other nodes reach this one.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=127.0.0.1
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # every port of Ray listens on loopback
if [ "$SLURM_NNODES" -gt 1 ]; then
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
    other=$(scontrol show node --oneliner "${nodes[1]}" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    address=$("$python" -c '
import socket, sys
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.connect((sys.argv[1], 9))
print(probe.getsockname()[0])' "$other") || fail "no way from $HOSTNAME to $other"
fi
read -r port client_port dashboard_port < <("$python" -c '
import socket
held = [socket.socket() for _ in range(3)]
for each in held:
    each.bind(("", 0))
print(*(each.getsockname()[1] for each in held))')
dashboard=http://127.0.0.1:$dashboard_port

# Ray chooses the ports that another job on these nodes could have taken.
start_ray() {
    exec "$python" -m ray.scripts.scripts start --block --disable-usage-stats "$@" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
}
export -f start_ray
export python
start_ray --head --node-ip-address="$address" --port="$port" --ray-client-server-port="$client_port" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" --temp-dir="$scratch" > "$folder/ray.txt" 2>&1 &
head=$!

# Wait until so many nodes are up, or a signal asks for an end.
wait_for() {
    "$python" -m stadapter.cluster.submit.ray_jobs "$dashboard" "$1" &
    ready=$!
    wait -n
    [ -z "$asked" ] || return
    kill -0 "$ready" 2> /dev/null && fail "Ray did not start; see $folder/ray.txt"
    wait "$ready" || fail "Ray is not up on $1 of $SLURM_NNODES nodes; see $folder/ray.txt"
    ready=''
}

wait_for 1
if [ "$SLURM_NNODES" -gt 1 ] && [ -z "$asked" ]; then
    # Ray gives the scratch folder the head's name on every node.
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="${nodes[0]}" --cpu-bind=none bash -c \
        'trap "rm -rf \"$1\"" EXIT; (start_ray --address="$2")' - "$scratch" "$address:$port" \
        >> "$folder/ray.txt" 2>&1 &
    workers=$!
    wait_for "$SLURM_NNODES"
fi
code=130
if [ -z "$asked" ]; then
    "$python" @COMMAND@ --address "$address:$port" &
    driver=$!
    [ -z "$asked" ] || tell_driver
    while interrupted=''; do
        wait "$driver"
        code=$?
        [ -n "$interrupted" ] || break
    done
    [ -n "$asked" ] && [ "$code" -eq 138 ] && code=130 # USR1 came before the driver had begun to listen
fi
clean_up
trap - EXIT
if [ "$code" -eq 130 ] && [ "$asked" = USR1 ]; then
    echo "back into the queue; the next start continues"
    scontrol requeue "$SLURM_JOB_ID" && exit 130
fi
echo "$code" > "$folder/ended"
exit "$code"
