"""The clients of benchmarks/serving.py, in a process of their own: asks over HTTP and writes down when what came.

Reads one JSON object from standard input: the address, how many clients ask at a time, and the requests, which the
clients take one after the other. Writes one JSON object: what became of each request, in seconds since the start.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp

PATIENCE = aiohttp.ClientTimeout(total=600)


async def ask(session: aiohttp.ClientSession, work: dict[str, Any], request: dict[str, Any], start: float) -> Any:
    """One streamed completion: when it was sent, when each piece of text came, and what the server counted."""
    body = {
        "model": work["model"],
        "prompt": request["prompt"],
        "max_tokens": request["max_tokens"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found: dict[str, Any] = {"sent": time.perf_counter() - start, "pieces": [], "text": "", "usage": None}
    try:
        async with session.post(work["url"], json=body) as answer:
            if answer.status != 200:
                return {**found, "error": f"HTTP {answer.status}: {(await answer.text())[:300]}"}
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    take(json.loads(line[len(b"data: ") :]), found, time.perf_counter() - start)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return {**found, "error": f"{type(error).__name__}: {error}"}
    return {**found, "ended": time.perf_counter() - start}


def take(event: dict[str, Any], found: dict[str, Any], now: float) -> None:
    """Adds what an event of the stream says to what is known of its request."""
    if "error" in event:
        raise ValueError(str(event["error"])[:300])
    text = "".join(choice.get("text") or "" for choice in event.get("choices") or [])
    if text:
        found["pieces"].append(now)
        found["text"] += text
    found["usage"] = event.get("usage") or found["usage"]


async def client(session: aiohttp.ClientSession, work: dict[str, Any], waiting: Iterator[Any], start: float) -> None:
    for request in waiting:
        request["found"] = await ask(session, work, request, start)


async def main(work: dict[str, Any]) -> list[Any]:
    waiting = iter(work["requests"])
    connections = aiohttp.TCPConnector(limit=0, force_close=True)  # a kept one may be closed as the next request leaves
    async with aiohttp.ClientSession(connector=connections, timeout=PATIENCE) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session, work, waiting, start) for _ in range(work["clients"])))
    return [request["found"] for request in work["requests"]]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
