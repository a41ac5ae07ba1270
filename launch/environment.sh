# shellcheck shell=bash
# Sourced by the other scripts: makes .venv beside pyproject.toml and installs the package into it, unless that is done.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
venv_python=$venv/bin/python
# In the folder above a checkout called fp8train, the working directory must not be taken for the package.
export PYTHONSAFEPATH=1

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# Prints the first Python 3.11 to 3.13 found, or the one that PYTHON names.
find_python() {
  local candidate seen="" candidates=(python3 python3.13 python3.12 python3.11)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    seen+=" $candidate ($("$candidate" -V 2>/dev/null || echo absent))"
  done
  fail "needs Python 3.11 to 3.13; found:$seen. Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

make_venv() {
  local python
  python=$(find_python) || exit 2
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python lacks venv or ensurepip; needs them to make .venv. On Debian or Ubuntu: sudo apt install python3-venv"
  echo "Making .venv with $("$python" -V) ($python)"
  "$python" -m venv --clear "$venv"
}

# install_package EXTRAS: installs the package with EXTRAS ("" or "[dev]"), once per content of pyproject.toml and
# constraints.txt; [dev] covers both.
install_package() {
  local extras=$1 stamp=$venv/installed wanted
  wanted=$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" <(echo "$root") | cksum)
  if "$venv_python" -c '' 2>/dev/null && grep -qxF -e "$wanted $extras" -e "$wanted [dev]" "$stamp" 2>/dev/null; then
    return
  fi
  if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    [[ -e $stamp || ! -e $venv ]] || fail "$venv has no working pip and was not made by this script. Move it away."
    make_venv
  fi
  echo "Installing torch into .venv (a minute on a CPU, a few gigabytes with CUDA)"
  pip_install torch
  echo "Installing fp8train$extras into .venv"
  pip_install -e "$root$extras"
  echo "$wanted $extras" >>"$stamp"
}

# Without --no-compile half of the time goes into byte code of modules that nobody imports.
pip_install() {
  "$venv_python" -m pip install -qq --no-compile --disable-pip-version-check \
    --constraint "$root/launch/constraints.txt" "$@" ||
    fail "pip could not install $*; its message is above. Put it right and run $0 again."
}
