# What every Ray process of a cluster starts with: sourced before `ray start`.
# The security group keeps others out of the cluster's ports, and the dashboard listens on loopback alone.
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
# An actor that spins while it waits takes the cores that decode.
export OMP_WAIT_POLICY=PASSIVE
export TRANSFGU_SPILL="${TRANSFGU_SPILL:-/mnt/spill}"
ulimit -n 65536
