#!/usr/bin/env bash
# A real multi-node SLURM cluster on one Debian machine: no systemd, no cgroups, run as root.
#   up [N]                  start N nodes (default 4), installing what is missing; safe to repeat
#   install                 only install what is missing
#   down                    cancel the jobs and stop all that `up` started (logs, state, accounting stay)
#   status                  daemons and nodes;   env: exports for clients, eval "$(local_slurm.sh env)"
#   crash NODE, boot NODE   power a node off (SIGKILL; with LS_NETNS=0 only its slurmd) and on again
#   cut NODE, heal NODE     unplug and replug a node's network (LS_NETNS=1)
# LS_NETNS=1: every node has its own hostname, address, PID space and /dev/shm. LS_NETNS=0: all share the
# machine's (needs no namespaces, but adds a line to /etc/hosts). LS_DBD=1: sacct works (slurmdbd, MariaDB).
# Several clusters stand side by side with other LS_ROOT, LS_PORT, LS_NET, LS_PREFIX (of nodes) and LS_TAG (of links).
set -euo pipefail
ROOT=${LS_ROOT:-${TMPDIR:-/var/tmp}/local_slurm} # the users munge and mysql must reach it: not below /root
if [ "${1:-}" != up ] && [ -f "$ROOT/params" ]; then . "$ROOT/params"; fi
N=${LS_NODES:-4} NETNS=${LS_NETNS:-auto} DBD=${LS_DBD:-1} PORT=${LS_PORT:-16800} NET=${LS_NET:-10.199.0} PRE=${LS_PREFIX:-node} TAG=${LS_TAG:-ls}
CPUS=${LS_CPUS:-8} GPUS=${LS_GPUS:-2} MEM=${LS_MEM_MB:-64000} # declared for each node, whatever the hardware
export SLURM_CONF=$ROOT/etc/slurm.conf PATH=$PATH:/usr/sbin:/sbin
SOCK=$ROOT/munge/socket MYSQL=(--no-defaults --socket="$ROOT/mysql/sock")
say() { echo "local_slurm: $*" >&2; }
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'; } # start time: tells a reused pid
alive() { local p b; [ -s "$ROOT/run/$1.pid" ] && read -r p b <"$ROOT/run/$1.pid" && [ -n "$b" ] && [ "$(born "$p")" = "$b" ]; }
start() { # NAME COMMAND...: run it in the background and record its pid
  local name=$1; shift; if alive "$name"; then return; fi
  setsid "$@" >>"$ROOT/log/$name.out" 2>&1 </dev/null 9>&- &
  echo "$! $(born $!)" >"$ROOT/run/$name.pid"
}
stop() { # NAME [SIGNAL]: only a process that start() recorded
  for sig in "${2:-TERM}" KILL; do
    if alive "$1"; then kill -"$sig" "$(cut -d' ' -f1 "$ROOT/run/$1.pid")"; fi
    for _ in $(seq 100); do alive "$1" || break; sleep 0.1; done
  done
  rm -f "$ROOT/run/$1.pid"
}
await() { # SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $end ]; then "$@" || true; say "gave up waiting for: $*; see $ROOT/log"; exit 1; fi
    sleep 0.2
  done
}
nodes_up() { [ "$(sinfo -h -N -t idle,mix,alloc -o %N | sort -u | wc -l)" = "$N" ]; }
install_missing() {
  local p want=(slurm-client slurmctld slurmd slurm-wlm-basic-plugins munge iproute2) missing=()
  if [ "$DBD" = 1 ]; then want+=(slurmdbd slurm-wlm-mysql-plugin mariadb-server); fi
  for p in "${want[@]}"; do dpkg -s "$p" >/dev/null 2>&1 || missing+=("$p"); done
  if [ ${#missing[@]} = 0 ]; then return; fi; say "installing ${missing[*]}"
  { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$ROOT/log/apt.log" 2>&1
}
# cred_expire is also the shortest delay before a requeued batch job starts again (120 s unless told).
# A job in `urgent` preempts one in `main`, which gets its --signal, GraceTime to act on it, and is requeued.
write_conf() {
  local addr="NodeAddr=$NET.[1-$N] Port=$((PORT + 20))" ctl=$NET.254 acct=none gres="" i
  if [ "$NETNS" != 1 ]; then ctl=127.0.0.1 addr="NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT + 21))-$((PORT + 20 + N))"; fi
  if [ "$DBD" = 1 ]; then acct=slurmdbd; fi
  : >"$ROOT/etc/gres.conf"
  for ((i = 0; i < GPUS; i++)); do # pretended GPUs (copies of /dev/null): scheduled, and seen in CUDA_VISIBLE_DEVICES
    gres=Gres=gpu:$GPUS; [ -c "$ROOT/dev/gpu$i" ] || mknod "$ROOT/dev/gpu$i" c 1 3
    echo "NodeName=$PRE[1-$N] Name=gpu File=$ROOT/dev/gpu$i" >>"$ROOT/etc/gres.conf"
  done
  echo "CgroupPlugin=cgroup/v1" >"$ROOT/etc/cgroup.conf" # unused, but slurmd ends when its autodetection fails
  sed -E '/^(#|NodeName|Partition)/! s/ +/\n/g' >"$ROOT/etc/slurm.conf" <<EOF # one setting a line
ClusterName=local SlurmctldHost=$(hostname -s)($ctl) SlurmctldPort=$PORT SlurmUser=root
AuthType=auth/munge AuthInfo=socket=$SOCK,cred_expire=5
MpiDefault=none ProctrackType=proctrack/linuxproc TaskPlugin=task/none PropagateResourceLimits=NONE
SlurmdParameters=config_overrides GresTypes=gpu SelectType=select/cons_tres SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/linux AccountingStorageType=accounting_storage/$acct
AccountingStorageHost=$ctl AccountingStoragePort=$((PORT + 1)) AccountingStoragePass=$SOCK
StateSaveLocation=$ROOT/state SlurmdSpoolDir=$ROOT/spool/%n SlurmctldPidFile=$ROOT/run/slurmctld.own SlurmdPidFile=$ROOT/run/slurmd.%n.own
SchedulerParameters=sched_interval=2,bf_interval=2 MinJobAge=3600
SlurmdTimeout=${LS_SLURMD_TIMEOUT:-20} MessageTimeout=5 TCPTimeout=2 KillWait=${LS_KILL_WAIT:-10} ReturnToService=2 JobRequeue=1
PreemptType=preempt/partition_prio PreemptMode=REQUEUE SlurmctldParameters=preempt_send_user_signal
NodeName=$PRE[1-$N] $addr CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${LS_GRACE:-20}
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
EOF
}
accounting() {
  chown mysql: "$ROOT/mysql"; [ -d "$ROOT/mysql/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$ROOT/mysql" \
    --skip-test-db --auth-root-authentication-method=socket >"$ROOT/log/mariadb-install.out" 2>&1
  start mariadbd mariadbd "${MYSQL[@]}" --user=mysql --datadir="$ROOT/mysql" --bind-address=127.0.0.1 --port=$((PORT + 2))
  await 30 mariadb-admin "${MYSQL[@]}" ping
  mariadb "${MYSQL[@]}" -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
    CREATE USER IF NOT EXISTS slurm@'%' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO slurm@'%';"
  (umask 077; printf '%s\n' "AuthType=auth/munge" "AuthInfo=socket=$SOCK" DbdHost=localhost "DbdPort=$((PORT + 1))" SlurmUser=root \
    "PidFile=$ROOT/run/slurmdbd.own" StorageType=accounting_storage/mysql StorageHost=127.0.0.1 "StoragePort=$((PORT + 2))" \
    StorageUser=slurm StoragePass=slurm >"$ROOT/etc/slurmdbd.conf")
  start slurmdbd slurmdbd -D
  await 30 sacctmgr -n list cluster
}
boot() { # NUMBER
  local n=$PRE$1
  mkdir -p "$ROOT/spool/$n"
  if [ "$NETNS" != 1 ]; then start "$n" slurmd -D -N "$n"; return; fi
  if ! ip netns list | grep -qw "$n"; then
    ip netns add "$n"; ip -n "$n" link set lo up
    ip link del "$TAG-$n" 2>/dev/null || true # a namespace lives on, with its link, until its last process is gone
    ip link add "$TAG-$n" type veth peer name eth0 netns "$n"; ip link set "$TAG-$n" master "$TAG-br" up
    ip -n "$n" addr add "$NET.$1/24" dev eth0; ip -n "$n" link set eth0 up; mkdir -p "/etc/netns/$n"
    { printf '127.0.0.1 localhost\n%s\n' "$NET.254 $(hostname -s)"
    for ((j = 1; j <= N; j++)); do echo "$NET.$j $PRE$j"; done; } >"/etc/netns/$n/hosts" # the node's /etc/hosts
  fi
  start "$n" ip netns exec "$n" unshare --mount --pid --uts --fork --kill-child --mount-proc \
    bash -c "hostname $n; mount -t tmpfs tmpfs /dev/shm; slurmd -D -N $n & wait"
}
up() {
  N=${1:-$N}; mkdir -p "$ROOT"/{etc,log,run,state,spool,munge,mysql,dev}
  exec 9>"$ROOT/lock"; flock 9
  install_missing
  if [ "$NETNS" = auto ]; then NETNS=0; if ip netns add "$TAG-probe" 2>/dev/null; then ip netns del "$TAG-probe"; NETNS=1; fi; fi
  local params="LS_NODES=$N LS_NETNS=$NETNS LS_DBD=$DBD LS_PORT=$PORT LS_NET=$NET LS_PREFIX=$PRE LS_TAG=$TAG"
  if ! alive slurmctld; then echo "$params" >"$ROOT/params"; write_conf
  elif [ "$params" != "$(cat "$ROOT/params")" ]; then say "up with other settings: run down first"; exit 1; fi
  [ -f "$ROOT/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$ROOT/munge/key")
  chown -R munge: "$ROOT/munge"; chmod 711 "$ROOT/munge"
  start munged setpriv --reuid=munge --regid=munge --clear-groups munged -F --force --socket="$SOCK" --key-file="$ROOT/munge/key" \
    --log-file="$ROOT/munge/log" --pid-file="$ROOT/munge/pid" --seed-file="$ROOT/munge/seed"
  await 10 munge -n -S "$SOCK"
  if [ "$NETNS" = 1 ]; then
    ip link show "$TAG-br" >/dev/null 2>&1 || { ip link add "$TAG-br" type bridge; ip addr add "$NET.254/24" dev "$TAG-br"; ip link set "$TAG-br" up; }
  elif ! grep -q '# local_slurm$' /etc/hosts; then echo "127.0.0.1 $(seq -f "$PRE%g" -s ' ' "$N") # local_slurm" >>/etc/hosts; fi
  if [ "$DBD" = 1 ]; then accounting; fi
  start slurmctld slurmctld -D
  await 30 sinfo
  for ((i = 1; i <= N; i++)); do boot "$i"; done
  await 60 nodes_up
  say "$N nodes up; for clients: eval \"\$($0 env)\""
}
down() {
  if alive slurmctld; then
    squeue -h -o %A | sort -u | xargs -r scancel || true
    for _ in $(seq 75); do if [ -z "$(squeue -h)" ]; then break; fi; sleep 0.2; done
  fi
  for ((i = 1; i <= N; i++)); do
    if [ "$NETNS" != 1 ]; then stop "$PRE$i"; continue; fi
    stop "$PRE$i" KILL; ip link del "$TAG-$PRE$i" 2>/dev/null || true; ip netns del "$PRE$i" 2>/dev/null || true; rm -rf "/etc/netns/$PRE$i"
  done
  for d in slurmctld slurmdbd mariadbd munged; do stop $d; done
  if [ "$NETNS" = 1 ]; then ip link del "$TAG-br" 2>/dev/null || true
  elif grep -q '# local_slurm$' /etc/hosts; then hosts=$(grep -v '# local_slurm$' /etc/hosts); echo "$hosts" >/etc/hosts; fi
}
status() {
  for d in munged mariadbd slurmdbd slurmctld $(seq -f "$PRE%g" "$N"); do alive "$d" && echo "$d up" || echo "$d down"; done
  if alive slurmctld; then sinfo -N -p main -o '%N %T %C %G %E'; fi
}
case ${1:-} in
  up | down | status) "$@" ;;
  install) mkdir -p "$ROOT/log"; install_missing ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  crash) stop "$2" KILL ;;   boot) boot "${2#"$PRE"}" ;;
  cut) ip link set "$TAG-$2" down ;;   heal) ip link set "$TAG-$2" up ;;
  *) sed -n '2,13s/^# //p' "$0"; exit 2 ;;
esac
