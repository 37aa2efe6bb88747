#!/usr/bin/env bash
# Makes the token of a cluster, unless there is one: 64 random digits in ~/.ray/auth_token, which its owner alone reads.
set -euo pipefail
umask 077
mkdir -p ~/.ray
[ -s ~/.ray/auth_token ] || python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >~/.ray/auth_token
chmod 600 ~/.ray/auth_token
