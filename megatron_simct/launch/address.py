"""The address by which a host reaches this one: python -m megatron_simct.launch.address HOST

A teacher's node says it to the students of another node, where names may not be known.
"""

from __future__ import annotations

import socket
import sys


def address_towards(host: str) -> str:
    """This machine's IPv4 address on the route to `host`; nothing is sent.

    Raises OSError if there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


if __name__ == "__main__":
    print(address_towards(sys.argv[1]))
