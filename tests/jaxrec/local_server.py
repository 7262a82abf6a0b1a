"""Real HTTP servers on this machine, for tests."""

import contextlib
import socketserver
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def started(server: socketserver.BaseServer) -> Iterator[socketserver.BaseServer]:
    """The server, answering in a thread of its own until the block ends; ``root`` is its address."""
    server.root = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
