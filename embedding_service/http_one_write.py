"""An answer in one piece: uvicorn writes its head and its body apart, and uvloop sends each of them at once.

Two system calls, two packets, and two times that HAProxy wakes up, reads and writes: at 32 connections these writes
took a seventh of a replica's event loop (py-spy).
"""

from __future__ import annotations

import asyncio
from typing import Any

_COPIED_BYTES = 64 * 1024  # of a body; to a larger one the head is not prepended


class OneWrite:
    """A transport that keeps the head of an answer until the first piece of its body comes.

    `flush`, after an answer, sends the head of one without a body. All else is that of `transport`.
    """

    __slots__ = ("_head", "_transport", "_write", "is_closing", "pause_reading", "resume_reading")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._write, self._head = transport, transport.write, b""
        self.is_closing = transport.is_closing
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            if len(data) <= _COPIED_BYTES:
                self._write(head + data)
            else:
                self._transport.writelines((head, data))
        elif data[-4:] == b"\r\n\r\n" and data[:9] == b"HTTP/1.1 " and data[9:10] != b"1":  # 1xx is no answer yet
            self._head = data
        else:
            self._write(data)

    def flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()
