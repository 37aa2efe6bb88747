#!/usr/bin/env bash
# Create the token of a cluster, unless it exists: 64 random digits in ~/.ray/auth_token, readable by its owner only.
set -euo pipefail
umask 077
mkdir -p ~/.ray
[ -s ~/.ray/auth_token ] || python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >~/.ray/auth_token
chmod 600 ~/.ray/auth_token
