#!/usr/bin/env bash
# Usage: ship_logs.sh URI   keeps copying this machine's Ray logs to URI/<host name>/<session>, in the background
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
logs=$(readlink --canonicalize /tmp/ray/session_latest)/logs # one session's: the next writes files of the same names
pid=~/.ship_logs.pid
[ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true
nohup ~/venv/bin/python "$here/ship_logs.py" "$logs" "$1/$(hostname)/$(basename "$(dirname "$logs")")" >~/ship_logs.log 2>&1 </dev/null &
echo $! >"$pid"
