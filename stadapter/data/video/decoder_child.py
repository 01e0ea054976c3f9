"""The child of `decoder_process`: reads requests from a socket, decodes, and answers."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from stadapter.data.video.decoding import ClipError, decode


def _serve(connection: Any) -> None:
    while True:
        try:
            path, indices, backend, short_side = connection.recv()
        except EOFError:  # the parent ended
            return

        def ask(total: int) -> list[int]:
            connection.send(("total", total))
            return connection.recv()

        try:
            answer: tuple[str, Any] = (
                "frames",
                decode(path, ask if indices is None else indices, backend=backend, short_side=short_side),
            )
        except EOFError:
            return
        except Exception as error:  # libraries raise errors of all types
            answer = ("error", str(error) if isinstance(error, ClipError) else f"{path}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _serve(Connection(int(sys.argv[1])))
