"""The `simmim` command over the stand-in for CUDA: python command.py pretrain smoke …"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_sim.cuda_host import convolutions, stand_in


def send_objects_by_gloo() -> None:
    """Objects of several processes: on their way through a device nothing would be left of them."""
    group: list[Any] = []

    def gloo() -> Any:
        if not group:
            group.append(dist.new_group(backend="gloo"))
        return group[0]

    broadcast, gather = dist.broadcast_object_list, dist.all_gather_object

    def broadcast_object_list(values: list[Any], src: int, device: Any = None) -> None:
        broadcast(values, src=src, group=gloo())

    def all_gather_object(values: list[Any], value: Any) -> None:
        gather(values, value, group=gloo())

    dist.broadcast_object_list, dist.all_gather_object = broadcast_object_list, all_gather_object


if __name__ == "__main__":
    if reason := stand_in.begin_again():
        sys.exit(f"command.py: {reason}")
    installed = convolutions.install()
    send_objects_by_gloo()
    from simmim import cli

    sys.exit(cli.main(sys.argv[1:]))
