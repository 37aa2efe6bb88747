#!/usr/bin/env bash
# Usage, as root: spill_disk.sh DISK FOLDER   mounts the disk at the folder; can be run again
set -euo pipefail
disk=$1 folder=$2
mkdir -p "$folder"
if findmnt --mountpoint "$folder" >/dev/null; then exit; fi
# AWS's images already mount a local disk, through a logical volume.
mounted=$(lsblk --noheadings --list --output MOUNTPOINT "$disk" | awk 'NF { print; exit }')
if [ -n "$mounted" ]; then
  mount --bind "$mounted" "$folder"
else
  mkfs.ext4 -q -F "$disk" # fails if the disk is in use
  mount -o noatime "$disk" "$folder"
fi
