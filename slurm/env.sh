# What this site needs, and nothing else: every job of this project sources this file on its first node.
# Examples:
#   module load gcc cuda
#   export HTTPS_PROXY=http://proxy:3128
#   export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0     # found by the route to the first node unless set

# The Python that has the project: a virtual environment that all nodes see.
DP4TL_PYTHON="${DP4TL_PYTHON:-${DP4TL_ROOT:-.}/.venv/bin/python}"
