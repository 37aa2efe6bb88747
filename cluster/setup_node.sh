#!/usr/bin/env bash
# Prepare one machine: a disk for spilled objects, and the project's packages in a virtual environment. Can be run again.
set -euo pipefail

# Mount the first local NVMe disk at /mnt/spill; without one, /mnt/spill is a folder of the root disk.
disk=$(lsblk --noheadings --nodeps --output PATH,MODEL | awk '/Instance Storage/ { print $1; exit }')
sudo mkdir -p /mnt/spill
if [ -n "$disk" ]; then
  sudo bash ~/transfgu/cluster/spill_disk.sh "$disk" /mnt/spill || echo "$disk is not used: spilling to the root disk"
fi
sudo chown "$USER" /mnt/spill

cd ~/transfgu
if ! cmp --silent constraints.txt ~/venv/constraints.txt; then
  cloud-init status --wait >/dev/null || true # a new machine first runs installations of its own, which lock apt
  sudo apt-get update --quiet=2
  sudo DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends python3-venv
  python3 -m venv ~/venv
  kind=cpu
  nvidia-smi >/dev/null 2>&1 && kind=gpu
  ~/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt ".[$kind]"
  cp constraints.txt ~/venv/
fi
# Ray runs commands in a login shell, which must find `ray`.
grep --quiet venv/bin ~/.bashrc || sed -i '1i export PATH="$HOME/venv/bin:$PATH"' ~/.bashrc
