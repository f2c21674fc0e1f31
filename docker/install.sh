#!/usr/bin/env bash
# usage: install.sh cpu|gpu system|stack|r2vpo [--dry-run]
#
# The steps by which an image is built; the Dockerfiles run nothing else. Each prints its commands as it runs them, or
# only prints them (--dry-run).
#
#   system  what the Python packages expect of the system, and the user that the image runs as
#   stack   the pinned lists: requirements/cpu.txt, as `make` installs it; for GPUs with the changes of docker/gpu.txt
#   r2vpo   this checkout, as a wheel: vLLM finds the weight transfer by the entry point of an installed distribution

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Asked for torch's CPU build only where pip, as it is configured, does not find it.
torch_cpu_index=https://download.pytorch.org/whl/cpu
# Pods ask for this user by number (runAsUser), and their volumes belong to its group.
user_id=1000

variant=${1-}
step=${2-}
dry_run=${3-}

usage() {
    echo "usage: install.sh cpu|gpu system|stack|r2vpo [--dry-run]" >&2
    exit 2
}

run() {
    printf '%q ' "$@"
    printf '\n'
    [ "$dry_run" ] || "$@"
}

pip_install() {
    run python -m pip install --quiet --no-cache-dir --no-deps --root-user-action=ignore "$@"
}

# g++: compilers in vLLM, torch and Triton call it at run time. libnuma1: vLLM's CPU kernels are linked with it.
# wget: KubeRay's health probes call it inside the container.
install_system() {
    run apt-get update
    run apt-get install --yes --no-install-recommends g++ libnuma1 wget
    run rm -rf /var/lib/apt/lists
    run useradd --uid "$user_id" --user-group --create-home r2vpo
    run install --directory --owner=r2vpo --group=r2vpo /runs
}

# The pins of the variant, one a line. A line of gpu.txt stands in for one of cpu.txt, and `-name` leaves one out.
pins() {
    if [ "$variant" = cpu ]; then
        grep -v -E '^(#|$)' requirements/cpu.txt
    else
        awk -F '==' '/^(#|$)/ {next}
            NR == FNR {name = $1; sub(/^-/, "", name); changed[name]; if ($0 !~ /^-/) print; next}
            !($1 in changed)' docker/gpu.txt requirements/cpu.txt
    fi
}

# torch first: without a pin that names its build, pip would take another. deepspeed last: it looks at the torch it finds.
install_stack() {
    local all torch deepspeed rest
    all=$(pins)
    torch=$(grep '^torch==' <<<"$all")
    deepspeed=$(grep '^deepspeed==' <<<"$all")
    mapfile -t rest < <(grep -v -E '^(torch|deepspeed)==' <<<"$all")
    if [ "$variant" = cpu ]; then
        pip_install "$torch" || pip_install --index-url "$torch_cpu_index" "$torch"
    else
        pip_install "$torch"
    fi
    pip_install "${rest[@]}"
    pip_install --no-build-isolation "$deepspeed"
}

install_r2vpo() {
    pip_install --no-build-isolation .
}

case $variant in cpu | gpu) ;; *) usage ;; esac
case $dry_run in '' | --dry-run) ;; *) usage ;; esac
case $step in system | stack | r2vpo) "install_$step" ;; *) usage ;; esac
