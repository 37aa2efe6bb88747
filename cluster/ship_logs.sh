#!/usr/bin/env bash
# Usage: ship_logs.sh URI   copies this machine's Ray logs to URI/<host name>/<session> repeatedly, in the background
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
logs=$(readlink --canonicalize /tmp/ray/session_latest)/logs # of one session, because the next one uses the same file names
pid=~/.ship_logs.pid
[ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true
nohup ~/venv/bin/python "$here/ship_logs.py" "$logs" "$1/$(hostname)/$(basename "$(dirname "$logs")")" >~/ship_logs.log 2>&1 </dev/null &
echo $! >"$pid"
