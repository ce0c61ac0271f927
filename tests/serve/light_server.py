"""The real adapters and the real records over a scripted engine, in processes made to be killed.

What they import is imported once, in a parent that forks one of them for each line that it reads.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop

from serve.records import Records
from serve.store import open_store
from tests.serve.fakes import serving


async def serve(url: str) -> None:
    log = Records(open_store(url))
    log.start()
    async with serving(records=log) as rig:
        print(os.getpid(), rig.http.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    for _ in sys.stdin:
        if os.fork() == 0:
            uvloop.run(serve(sys.argv[1]))
        os.wait()
