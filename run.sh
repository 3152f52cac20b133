#!/usr/bin/env bash
# One door to the project. Every command first sets up what it needs; where all is in place that takes a blink and no network.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
python=$venv/bin/python
stamp_file=$venv/setup-stamp       # written last: what was installed, for which Python, at which path
unfinished=$venv/setup-unfinished  # there while a setup runs: found later, the environment is thrown away

help() {
    cat <<'HELP'
usage: ./run.sh COMMAND [OPTIONS]

  setup        make .venv and install everything into it (system packages too, where that is allowed)
  demo         make images, convert, pretrain and evaluate a small model: the whole project in one go
  test         run the tests; options go to pytest:  ./run.sh test -k masks
  lint         check style, layout and types, as continuous integration does
  convert      turn a folder of images into FFCV files:  ./run.sh convert --help
  pretrain     train on every GPU of this machine, or on the CPU:  ./run.sh pretrain --config ds_configs/FILE.json
  evaluate     measure what a pretrained encoder has learnt:  ./run.sh evaluate --help
  tensorboard  show the curves of a folder of runs (default: runs), to this machine alone

  PYTHON=/path/to/python              the Python (3.10 to 3.13) to build .venv with
  DEEPSPEED_ARGS="--num_gpus 2"       options for the deepspeed launcher of `pretrain`
  TENSORBOARD_HOST=0.0.0.0            the address that `tensorboard` listens on, if others may see it (default: 127.0.0.1)
HELP
}

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---- Python ----------------------------------------------------------------------------------------------------------

# Prints "complete PATH" or "incomplete PATH" (no venv, no headers) for a Python we support, nothing for any other.
# PATH is the interpreter behind a virtual environment: ours is about to be deleted if it is the one that is active.
inspect_python() {
    "$1" - 2>/dev/null <<'PY' || true
import importlib.util, os, sys, sysconfig
supported = (3, 10) <= sys.version_info[:2] <= (3, 13) and not sysconfig.get_config_var("Py_GIL_DISABLED")
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
complete = headers and all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
if supported:
    behind = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
    print("complete" if complete else "incomplete", sys.executable if sys.prefix == sys.base_prefix else behind)
PY
}

# Prints "complete PATH" or "incomplete PATH" of the Python to use: the first complete one, else the first of all.
find_python() {
    local candidate found first=""
    if [[ -n ${PYTHON:-} ]]; then
        found=$(inspect_python "$PYTHON")
        [[ -n $found ]] || die "PYTHON=$PYTHON is not a working Python 3.10 to 3.13; name another, or unset PYTHON to let run.sh look for one"
        echo "$found"
        return
    fi
    for candidate in python3 python3.{13,12,11,10} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0-3].*/bin/python; do
        found=$(inspect_python "$candidate")
        if [[ $found == complete* ]]; then
            echo "$found"
            return
        fi
        first=${first:-$found}
    done
    [[ -n $first ]] || die "no Python 3.10 to 3.13 found; install one (Debian 12, Ubuntu 22.04: apt-get install python3 python3-venv python3-dev), or name one with PYTHON=/path/to/python"
    echo "$first"
}

# ---- System packages -------------------------------------------------------------------------------------------------

# Prints the Debian packages that are missing. ffcv comes as source: it needs a compiler, OpenCV and libturbojpeg.
missing_system_packages() { # complete|incomplete PYTHON
    local version
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    if [[ $1 == incomplete ]]; then
        [[ $2 == /usr/bin/* ]] || die "$2 lacks venv, ensurepip or its C headers (Python.h); name another Python 3.10 to 3.13 with PYTHON=/path/to/python"
        version=$("$2" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        echo "$version-venv"
        echo "$version-dev"
    fi
}

install_system_packages() { # PACKAGE...
    local as_root=(env DEBIAN_FRONTEND=noninteractive) packages=("$@") output
    command -v apt-get >/dev/null ||
        die "this system has no apt-get; install a C++ compiler, pkg-config, and the development files of OpenCV 4, libturbojpeg and Python by its own means (wanted under Debian: $*)"
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || die "system packages are missing; run this, then try again: sudo apt-get install -y $*"
        as_root=(sudo -n "${as_root[@]}")
    fi
    say "installing system packages: $*"
    "${as_root[@]}" apt-get update -qq </dev/null || say "apt-get update failed; trying with the package lists there are"
    # Ubuntu before 18.04 and its offspring call it by the other name.
    apt-cache show libturbojpeg0-dev >/dev/null 2>&1 || packages=("${packages[@]/libturbojpeg0-dev/libturbojpeg-dev}")
    output=$("${as_root[@]}" apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "${packages[@]}" </dev/null 2>&1) || {
        printf '%s\n' "$output" >&2
        die "apt-get could not install the system packages; see its message above, then run: apt-get install -y ${packages[*]}"
    }
}

# ---- The virtual environment -----------------------------------------------------------------------------------------

stamp() {
    { cat "$root/setup.py" "$root/constraints.txt" && "$python" -V && echo "$root"; } 2>&1 | sha256sum
}

is_set_up() {
    [[ -f $stamp_file && ! -e $unfinished && -x $python && $(<"$stamp_file") == "$(stamp)" ]] &&
        [[ -z ${PYTHON:-} || $("$PYTHON" -V 2>&1) == "$("$python" -V 2>&1)" ]]
}

# An environment that works is updated in place, others may be running from it; anything doubtful is made anew.
make_venv() { # PYTHON
    if [[ ! -e $unfinished && $("$python" -V 2>&1) == "$("$1" -V 2>&1)" ]] && "$python" -m pip --version >/dev/null 2>&1 &&
        head -n 3 "$venv/bin/pip" | grep -qF "$venv/"; then # not so in a clone that was moved
        touch "$unfinished"
        rm -f "$stamp_file"
        return
    fi
    say "making .venv with $("$1" -V) ($1)"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$unfinished"
    "$1" -m venv "$venv" || die "$1 could not make a virtual environment in $venv; name another Python with PYTHON=/path/to/python"
}

install_packages() {
    say "installing the Python packages (the first time downloads about 3 GB)"
    cd -- "$root"
    # uv is many times faster and links from its cache, so a second clone costs next to no time and disk.
    if "$python" -m pip install -q --disable-pip-version-check -c constraints.txt uv; then
        "$python" -m uv pip install -q --python "$python" -c constraints.txt -e '.[dev]' && return
        say "uv failed (above); trying again with pip, which may know a package mirror that uv does not"
    else
        say "uv could not be installed (above); going on with pip, which is slower"
    fi
    "$python" -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' ||
        die "the Python packages could not be installed; see the message above (network? disk space? a compiler error of ffcv?), then run ./run.sh setup again"
}

check_imports() {
    "$python" -W ignore -c 'import torch, torchvision, deepspeed, ffcv, timm, tensorboard' >/dev/null ||
        die "the packages are installed but one cannot be imported (see above); if it names a shared library, install that, else delete .venv and run ./run.sh setup again"
}

setup() {
    local found packages
    is_set_up && return
    # Two commands started at once: the second waits, then finds the work done. (Any file of ours can carry the lock.)
    exec 9<"$root/setup.py"
    ! command -v flock >/dev/null || flock 9
    if ! is_set_up; then
        found=$(find_python)
        mapfile -t packages < <(missing_system_packages "${found%% *}" "${found#* }")
        wait $! # a process substitution does not pass its failure on by itself
        ((${#packages[@]} == 0)) || install_system_packages "${packages[@]}"
        make_venv "${found#* }"
        (install_packages)
        check_imports
        stamp >"$stamp_file"
        rm -f "$unfinished"
        say "done"
    fi
    exec 9<&-
}

# ---- Training --------------------------------------------------------------------------------------------------------

# The processes that train. Not the launchers above them: the inner one of `deepspeed` kills them 30 seconds after a
# signal, before a large checkpoint is written.
ranks() { # GROUP
    pgrep -g "$1" -f -- '--local_rank=' 2>/dev/null || echo "-$1" # none yet (or no pgrep): the whole group
}

group_is_alive() { # GROUP. Zombies do not count: in many containers nothing ever collects them.
    local pid
    for pid in $(pgrep -g "$1" 2>/dev/null); do
        [[ $(cat "/proc/$pid/stat" 2>/dev/null) =~ \)\ [^ZX] ]] && return
    done
    return 1
}

# Runs a command in a process group of its own; TERM, INT, HUP or USR1 to run.sh asks its ranks to stop (SIGTERM: save
# and leave), a second Ctrl-C kills them. Returns the command's exit code once no process of the group is left.
run_group() {
    local group status=0 signalled=first interrupts=0 waited
    set -m # background jobs get their own process group, and keep SIGINT
    "$@" </dev/null &
    group=$!
    set +m
    trap 'signalled=yes; kill -TERM -- $(ranks "$group") 2>/dev/null || true' TERM HUP USR1
    trap 'signalled=yes; if ((interrupts++)); then kill -KILL -- "-$group"; else
        echo "stopping: ranks save and leave; Ctrl-C again kills them" >&2; kill -TERM -- $(ranks "$group"); fi 2>/dev/null || true' INT
    while [[ -n $signalled ]]; do # a trapped signal ends `wait` before the command has ended
        signalled=""
        status=0
        wait "$group" || status=$?
    done
    # Something killed the launcher: its ranks would go on alone, holding the GPUs.
    for ((waited = 0; waited < 60; waited++)); do
        group_is_alive "$group" || break
        ((waited % 20)) || kill -TERM -- "-$group" 2>/dev/null || true
        sleep 1
    done
    kill -KILL -- "-$group" 2>/dev/null || true
    trap - TERM INT HUP USR1
    return "$status"
}

# ---- Checks ----------------------------------------------------------------------------------------------------------

# All three have their say, whatever the first finds.
lint() {
    local status=0
    "$python" -m ruff check . || status=1
    "$python" -m ruff format --check . || status=1
    "$python" -m mypy || status=1
    return "$status"
}

# ---- Commands --------------------------------------------------------------------------------------------------------

main() {
    local command=${1:-help} launcher_args
    shift || true
    case $command in
        help | -h | --help) help && exit ;;
        setup | demo | test | lint | convert | pretrain | evaluate | tensorboard) setup ;;
        *) die "unknown command '$command'; ./run.sh help lists them" ;;
    esac
    export PATH=$venv/bin:$PATH
    # A build that was killed leaves a lock in torch's cache, on which later ones wait for ever: keep it to this clone.
    export TORCH_EXTENSIONS_DIR=$venv/torch_extensions
    case $command in
        demo) exec "$python" -m ijepa_ds demo "$@" ;;
        # Two at a time, file by file: most of a test's time is the start of processes.
        test) cd -- "$root" && exec "$python" -m pytest -n 2 --dist loadfile "$@" ;;
        lint) cd -- "$root" && lint ;;
        convert) exec "$python" "$root/data_prep/to_ffcv.py" "$@" ;;
        pretrain)
            read -ra launcher_args <<<"${DEEPSPEED_ARGS:-}"
            export IJEPA_STARTER=$$ # the ranks leave when this script is gone
            run_group deepspeed "${launcher_args[@]}" "$root/run.py" "$@"
            ;;
        evaluate) exec "$python" -m ijepa_ds evaluate "$@" ;;
        # It asks nobody for a password.
        tensorboard) exec tensorboard --host "${TENSORBOARD_HOST:-127.0.0.1}" --logdir "${1:-runs}" "${@:2}" ;;
    esac
}

# Sourced (by the tests), it only defines its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
