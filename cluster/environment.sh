# Environment of every Ray process of a cluster: source it before `ray start`.
# Ray's processes answer only requests with the token of ~/.ray/auth_token (make_token.sh). In addition, the security group
# closes the cluster's ports to others, and the dashboard listens on the loopback device.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# Threads must not spin while they wait, because other processes need the cores for decoding.
export OMP_WAIT_POLICY=PASSIVE
export TRANSFGU_SPILL="${TRANSFGU_SPILL:-/mnt/spill}"
ulimit -n 65536
