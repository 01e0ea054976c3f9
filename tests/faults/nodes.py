"""A Ray cluster of three nodes on this machine, which prints its address and ends with its standard input.

It runs as a separate process, because Ray decides once for a process which token it has.
"""

import json
import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_port": int(sys.argv[1])})
try:
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
