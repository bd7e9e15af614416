# Defines the command `uv` for the scripts beside this file. Source it.
if ! command -v uv >/dev/null; then
    python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install --quiet uv
    uv() { python3 -m uv "$@"; }
fi
