# Sourced by the other scripts: makes .venv in the repository, with what requirements.txt lists, and works from there.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec 9> .venv.lock
if command -v flock > /dev/null; then flock 9; fi  # two of the scripts at once: the second waits until all is installed
if [ ! -x .venv/bin/pip ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 1; }
    echo "making .venv"
    python3 -m venv .venv
fi
wanted=$(cat requirements.txt pyproject.toml | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing requirements.txt into .venv (a few minutes the first time)"
    .venv/bin/pip install --quiet --disable-pip-version-check --editable .
    echo "$wanted" > .venv/installed
fi
PATH="$PWD/.venv/bin:$PATH"
exec 9>&-
