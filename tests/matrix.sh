#!/usr/bin/env bash
# Install and test under each Python as the README says: tests/matrix.sh [VERSION...] [-- ARGUMENTS OF PYTEST]
# Each is looked for on PATH as pythonX.Y (with pyenv: `pyenv shell 3.10 3.11 3.12 3.13` first) and then with uv, which
# downloads it. The virtual environment, about 6 GB with CUDA's libraries, is in TMPDIR (/tmp) until its tests have run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
versions=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions="$versions $1" && shift; done
[ $# -gt 0 ] && shift # the --
command=$(grep '&& pytest$' README.md) || exit 1

python_of() { # the path of Python $1; nothing if it cannot be had
    "python$1" -c '' 2> /dev/null && command -v "python$1" && return
    command -v uv > /dev/null || return
    uv python find --system "$1" 2> /dev/null || { uv python install "$1" && uv python find --system "$1" 2> /dev/null; }
}

directory=$(mktemp -d) || exit 1
export VENV="$directory/venv"
trap 'rm -rf "$directory"' EXIT
trap 'exit 130' INT # pytest handles Ctrl-C itself; without this line the next version would start
summary='' passed=0 failed=0
for version in ${versions:-3.10 3.11 3.12 3.13}; do
    python=$(python_of "$version")
    if [ -z "$python" ]; then
        summary+="$version: no interpreter"$'\n'
        continue
    fi
    if ("$python" -m venv --clear "$VENV" && eval "${command//.venv/\"\$VENV\"} \"\$@\"") 2>&1 | tee "$directory/log"; then
        result=passed passed=$((passed + 1))
    else
        result=failed failed=$((failed + 1))
    fi
    tests=$(grep -E '(passed|failed|error|no tests ran).* in [0-9.]+s' "$directory/log" | tail -n 1 | tr -d =)
    summary+="$("$python" -V) $result:${tests:- not installed}"$'\n'
done
printf '\n%s' "$summary"
[ $failed = 0 ] && [ $passed -gt 0 ]
