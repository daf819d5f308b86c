"""A reload's way from the controller to every worker of a model."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from urllib.parse import quote

import httpx

from mindspeed_mm.serving.refusal import RequestRefused
from mindspeed_mm.serving.worker_pool import KnownWorker, WorkerPool, no_worker

logger = logging.getLogger(__name__)


async def reload_everywhere(pool: WorkerPool, client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    """Have all workers of a model read its adapter again, at the same time.

    Returns:
        The answer: "workers" that did, and "lost" ones that could not be asked. One that is lost for good, or was
        started again, needs nothing; one that comes back as it was still has the old adapter.

    Raises:
        RequestRefused: no worker has that model or can be reached; or one has not read it, with its own reason. The
            others have the new adapter then: the same request again brings all of them together.
    """
    workers = pool.having(model)
    answers = await asyncio.gather(*(_ask(client, worker, model) for worker in workers))
    asked = [answer for answer in answers if answer is not None]
    if not asked:
        raise no_worker(model)
    failed = [answer for answer in asked if not answer.is_success]
    if failed:
        error = _error(failed[0])
        raise RequestRefused(
            f"{len(failed)} of {len(asked)} workers did not read the adapter {model[:200]!r} again: {error['message']}",
            status=failed[0].status_code,
            param=error.get("param"),
            code=error.get("code"),
        )
    lost = len(workers) - len(asked)
    logger.info("the adapter %s was read again by %s workers; %s could not be asked", model, len(asked), lost)
    return {"id": model, "status": "reloaded", "workers": len(asked), "lost": lost}


async def _ask(client: httpx.AsyncClient, worker: KnownWorker, model: str) -> httpx.Response | None:
    """A worker's answer; None where it cannot be reached."""
    address = f"{worker.notice.address}/v1/models/{quote(model, safe='')}/reload"
    try:
        return await client.post(address, json={})
    except httpx.TransportError as error:
        logger.warning("the worker at %s did not read an adapter again: %s", worker.notice.address, repr(error))
        return None


def _error(answer: httpx.Response) -> dict[str, Any]:
    """The error of a worker's answer, which has the protocol's form unless something else stands between."""
    try:
        found = answer.json()["error"]
        return {**found, "message": str(found["message"])}
    except (ValueError, LookupError, TypeError):
        return {"message": f"the answer was {answer.status_code} {answer.text[:200]!r}"}
