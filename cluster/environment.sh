# What every Ray process of a cluster starts with: sourced before `ray start`.
# Ray's processes answer those alone that send the token of ~/.ray/auth_token (make_token.sh). Besides, the security group
# keeps others out of the cluster's ports, and the dashboard listens on loopback.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# An actor that spins while it waits takes the cores that decode.
export OMP_WAIT_POLICY=PASSIVE
export TRANSFGU_SPILL="${TRANSFGU_SPILL:-/mnt/spill}"
ulimit -n 65536
