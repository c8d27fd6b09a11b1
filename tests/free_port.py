"""A port for ranks to meet at, chosen so that no other program takes it before they do."""

import random
import socket

# Below the ports systems give to outgoing connections, which gloo opens by the dozen in other tests.
PORTS = range(20000, 32000)


def free_port() -> int:
    """A port of this machine that nobody listens on; another process would have to draw the same one."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
