#!/usr/bin/env bash
# usage: install.sh TORCH_CPU_INDEX
#
# Builds .venv from requirements/ and this checkout; the Makefile calls it. Prints a few lines of progress. What the
# current step says goes to .venv/install.log; a step that fails becomes one sentence, and exit status 1.
#
# .venv/.installed is removed first and written last: a .venv without it is the ruin of an interrupted install and is
# built anew, a .venv with it is brought up to date.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_cpu_index=$1
needed_gb=5
stamp=.venv/.installed
log=.venv/install.log
label=

fail() {
    [ -z "$label" ] || printf 'failed\n'
    printf 'install: %s\n' "$1" >&2
    exit 1
}

# Python 3.11 first: it is the one that the pinned list was tested with.
find_python() {
    local candidate without_venv=
    for candidate in python3.11 python3.12 python3.13 python3; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            return
        fi
        without_venv=$candidate
    done
    [ -z "$without_venv" ] ||
        fail "$without_venv comes without the venv module; install it (on Debian: $without_venv-venv) and run make again"
    fail "no Python 3.11 or newer found (looked for python3.11, python3.12, python3.13, python3); install one and run make again"
}

# step LABEL COMMAND…: runs the command and shows the label with the seconds since the start.
step() {
    label=$1
    shift
    printf '  %-54s' "$label"
    "$@" </dev/null >"$log" 2>&1 || fail "$(diagnosis)"
    printf '%4d s\n' "$SECONDS"
    label=
}

free_mb() {
    df -Pk . | awk 'NR == 2 {print int($4 / 1024)}'
}

# What went wrong in the step whose words are in the log, as one sentence.
diagnosis() {
    local no_network='NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError'
    no_network+='|Connection(Refused|Reset|Aborted)?Error|Max retries exceeded|RemoteDisconnected|IncompleteRead'
    if [ "$(free_mb)" -lt 50 ] || grep -q -E 'Errno 28|No space left|Disk quota exceeded' "$log"; then
        echo "the disk is full: .venv needs about $needed_gb GB in $PWD; make room and run make again"
    elif grep -q -E "$no_network" "$log"; then
        echo "no network: pip could not reach its package index for this step; check the connection (or pip's" \
            "settings) and run make again; all its words are in $log"
    else
        echo "the step failed: $(grep -i error "$log" | tail -n 1 | cut -c -300 || true); all its words are in $log"
    fi
}

# PyTorch's CPU build is on few package indexes; where pip's does not have it, PyTorch's own does.
install_torch() {
    "${pip[@]}" "$torch" || "${pip[@]}" --index-url "$torch_cpu_index" "$torch"
}

# Shows that the stack loads, and leaves bytecode for what the job imports; compiling all the rest costs a minute.
load_stack() {
    env -u PYTHONDONTWRITEBYTECODE .venv/bin/python - <<'PYTHON'
import datasets, hypothesis, math_verify, omegaconf, pytest, ray, rich.live, torch, transformers, wandb
import vllm.v1.engine.async_llm, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
import transformers.models.qwen2.modeling_qwen2
PYTHON
}

exec 9<"${BASH_SOURCE[0]}" && flock 9 # a second make waits here for the first one's install

fresh=
if [ ! -e "$stamp" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    fresh=yes
    find_python
    rm -rf .venv
    free_gb=$(($(free_mb) / 1024))
    [ "$free_gb" -ge "$needed_gb" ] ||
        fail "the disk is too full: .venv needs about $needed_gb GB in $PWD and $free_gb GB are free; make room and run make again"
fi
rm -f "$stamp"

mkdir -p .venv/tmp
export TMPDIR=$PWD/.venv/tmp # pip unpacks about 1 GB on the way; /tmp may be small
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_REQUIRE_VIRTUALENV=0
pip=(.venv/bin/python -m pip install --quiet --no-compile --no-deps)
torch=$(grep '^torch==' requirements/cpu.txt)
deepspeed=$(grep '^deepspeed==' requirements/cpu.txt)
grep -h -v -E '^(torch|deepspeed)==|^#|^$' requirements/*.txt >.venv/tmp/rest.txt

if [ "$fresh" ]; then
    echo "Installing into .venv: 2 to 4 minutes, $needed_gb GB (details in $log)"
    step "$("$python" -V)" "$python" -m venv .venv
else
    echo "Bringing .venv up to date (details in $log)"
fi
step "torch ${torch#torch==}" install_torch
step "$(wc -l <.venv/tmp/rest.txt) packages: vLLM, Ray, transformers, tools" "${pip[@]}" -r .venv/tmp/rest.txt
[ -z "$fresh" ] || step "first import of the stack" load_stack
step "deepspeed ${deepspeed#deepspeed==}" "${pip[@]}" --compile --no-build-isolation "$deepspeed"
step "r2vpo, from this checkout" "${pip[@]}" --no-build-isolation --editable .
rm -rf .venv/tmp
touch "$stamp"
echo "Installed in $SECONDS s."
