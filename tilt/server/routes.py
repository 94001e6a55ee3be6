"""The HTTP routes of a reward server, as an ASGI application.

    GET  /reward    what is served: the spec, its identity, components, range and limits
    POST /score     scores of a batch of images
    POST /check     whether prompts can be scored

Every refusal is {"detail": one sentence}. The forms of the bodies are described in
`rewards.backends.reward_messages`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect, Request

from rewards.backends.reward_messages import JSON, SAFETENSORS
from tilt.server.requests import BadRequest
from tilt.server.scorer import Busy, Gone, Scorer
from tilt.wording import one_line

__all__ = ["routes"]

READING = 120.0  # seconds in which the body of a request must arrive
log = logging.getLogger("tilt.serve")


def routes(scorer: Scorer) -> FastAPI:
    """Return the application that answers for this reward."""
    app = FastAPI(title="Tilt", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/reward")
    async def reward() -> Response:
        return JSONResponse(scorer.served.to_json())

    @app.post("/score")
    async def score(request: Request) -> Response:
        return await _answer(scorer, request, {SAFETENSORS, JSON}, scorer.score)

    @app.post("/check")
    async def check(request: Request) -> Response:
        return await _answer(scorer, request, {JSON}, lambda body, _: scorer.check(body))

    return app


async def _answer(
    scorer: Scorer, request: Request, kinds: set[str], work: Callable[[bytes, str], bytes]
) -> Response:
    """Return work(body, content type), in its turn; any error becomes a response."""
    try:
        with scorer.place():
            kind = _kind(request, kinds)
            body = await _body(request, scorer.served.max_bytes)
            answer = await scorer.turn(lambda: work(body, kind), request.is_disconnected)
        return Response(answer, media_type=JSON)
    except Busy as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
    except (Gone, ClientDisconnect):
        return Response(status_code=400)  # which nobody reads
    except BadRequest as error:
        raise HTTPException(error.status, one_line(error)) from None
    except ValueError as error:  # the reward's own sentence
        raise HTTPException(422, one_line(error)) from None
    except Exception as error:
        log.exception("a request failed")
        said = f"the reward failed with {type(error).__name__}: {one_line(error)}"
        raise HTTPException(500, said[:500]) from None


def _kind(request: Request, kinds: set[str]) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        known = " or ".join(sorted(kinds))
        raise BadRequest(415, f"the content type is {kind!r:.80} but must be {known}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest(415, "the body is compressed: send it as it is")
    return kind


async def _body(request: Request, most: int) -> bytes:
    """Return the body of a request; raises BadRequest as soon as it is too long, or late."""
    said = f"the request has more than {most} bytes: send fewer images at once"
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise BadRequest(413, said)
    found = bytearray()
    try:
        async with asyncio.timeout(READING):
            async for part in request.stream():
                found += part
                if len(found) > most:
                    raise BadRequest(413, said)
    except TimeoutError:
        raise BadRequest(408, f"the request did not arrive within {READING:g} s") from None
    return bytes(found)
