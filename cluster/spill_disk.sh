#!/usr/bin/env bash
# Usage, as root: spill_disk.sh DISK FOLDER   finds the disk's room at the folder; may be run again
set -euo pipefail
disk=$1 folder=$2
mkdir -p "$folder"
if findmnt --mountpoint "$folder" >/dev/null; then exit; fi
# AWS's images mount a local disk themselves, by a logical volume on it.
mounted=$(lsblk --noheadings --list --output MOUNTPOINT "$disk" | awk 'NF { print; exit }')
if [ -n "$mounted" ]; then
  mount --bind "$mounted" "$folder"
else
  mkfs.ext4 -q -F "$disk" # it refuses one that is in use
  mount -o noatime "$disk" "$folder"
fi
