#!/usr/bin/env bash
# The README's test command under each Python: tests/matrix.sh [VERSION...] [-- ARGUMENTS OF PYTEST]
# An interpreter is pythonX.Y on PATH (with pyenv: `pyenv shell 3.10 3.11 3.12 3.13` first), or else what uv finds or
# downloads. Its virtual environment, 6 GB with CUDA's libraries, is in a temporary directory and is removed at the end.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
versions=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ $1 =~ ^3\.[0-9]+$ ]] || { echo "$1 is not like 3.10; arguments for pytest come after --." >&2 && exit 2; }
    versions+=" $1" && shift
done
[ $# -gt 0 ] && shift # the --
command=$(grep '&& pytest$' README.md) || exit 1
command=${command//.venv/\"\$VENV\"}

python_of() { # prints the path of Python $1, or nothing if it cannot be had
    "python$1" -c '' 2> /dev/null && command -v "python$1" && return
    command -v uv > /dev/null || return
    uv python find --system "$1" 2> /dev/null && return
    uv python install "$1" >&2 && uv python find --system "$1"
}

directory=$(mktemp -d) || exit 1
export VENV="$directory/venv"
trap 'rm -rf "$directory"' EXIT
trap 'exit 130' INT # pytest handles Ctrl-C and returns: without this the next version would start
summary='' passed=0 failed=0
for version in ${versions:-3.10 3.11 3.12 3.13}; do
    python=$(python_of "$version")
    [ -z "$python" ] && summary+="$version no interpreter"$'\n' && continue
    # --upgrade-deps: Python 3.10 brings pip 23.0, which tries version after version (docs/training.md#python-versions)
    if ("$python" -m venv --clear --upgrade-deps "$VENV" && eval "$command \"\$@\"") 2>&1 | tee "$directory/log"; then
        outcome=passed passed=$((passed + 1))
    else
        outcome=failed failed=$((failed + 1))
    fi
    tests=$(grep -E '(passed|failed|skipped|error|ran).* in [0-9.]+s' "$directory/log" | tail -n 1 | tr -d =)
    summary+="$("$python" -V) $outcome:${tests:- before the tests}"$'\n'
done
printf '\n%s' "$summary"
[ $failed = 0 ] && [ $passed -gt 0 ]
