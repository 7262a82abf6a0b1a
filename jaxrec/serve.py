"""Our models over HTTP, in the OpenAI protocol: `jaxrec serve MODEL`.

    POST /v1/chat/completions    POST /v1/completions    GET /v1/models    GET /health

An ASGI application (Starlette, uvicorn) in front of one :class:`jaxrec.serve_engine.Engine`, which fills batches from
all requests. Errors have the protocol's form: 400 for what a field may not be, 404 for another model, 413 for a body
that is too large, 429 while too many wait, 500 for what is our fault, 503 while shutting down. There is no login:
listen to other machines only where those may use the model.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jax

from jaxrec.serve_engine import Busy, Closed, Engine, Job, Part, Ticket
from jaxrec.serve_protocol import Asked, Refused, chunk, closing, opening, read, whole

_log = logging.getLogger("jaxrec.serve")


def application(engine: Engine, name: str, max_body: int = 4_000_000):
    """The Starlette application that serves ``engine`` as model ``name``. max_body: bytes of a request, at most."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def models(request) -> Any:
        return JSONResponse({"object": "list", "data": [_card(name, engine)]})

    async def one_model(request) -> Any:
        if request.path_params["name"] != name:
            raise Refused(404, f"no model '{request.path_params['name']}' is served here", "model", "model_not_found")
        return JSONResponse(_card(name, engine))

    async def health(request) -> Any:
        return JSONResponse({"status": "ok", "model": name, **engine.state()})

    async def refused(request, error: Refused) -> Any:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    async def http_error(request, error: HTTPException) -> Any:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return await refused(request, Refused(error.status_code, what))

    def answers(chat: bool):
        async def handle(request) -> Any:
            return await _answer(request, engine, name, chat, max_body)

        return handle

    routes = [
        Route("/v1/chat/completions", answers(True), methods=["POST"]),
        Route("/v1/completions", answers(False), methods=["POST"]),
        Route("/v1/models", models), Route("/v1/models/{name:path}", one_model), Route("/health", health),
    ]  # fmt: skip
    handlers = {Refused: refused, HTTPException: http_error}
    return Starlette(routes=routes, exception_handlers=handlers)


def _card(name: str, engine: Engine) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "jaxrec", "max_model_len": engine.max_len}


def _as_refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, str(error), code="too_many_requests")
    if isinstance(error, Closed):
        return Refused(503, str(error), code="shutting_down")
    _log.error("a request failed", exc_info=error)
    return Refused(500, "the model failed on this batch of requests; the server's log says how", code="internal_error")


async def _answer(request, engine: Engine, name: str, chat: bool, max_body: int) -> Any:
    from starlette.responses import JSONResponse, Response, StreamingResponse

    asked = read(await _json(request, max_body), chat, engine, name)
    try:
        answers = _Answers(request, engine, asked)
        parts = [] if asked.stream else [item async for item in answers]
    except Exception as error:
        raise _as_refused(error) from error
    if asked.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy in between must not collect it
        return StreamingResponse(_events(answers), media_type="text/event-stream", headers=headers)
    if answers.gone:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(whole(asked, parts, engine))


async def _json(request, max_body: int) -> Any:
    too_large = Refused(413, f"the request is larger than {max_body} bytes", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_body:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_body:
            raise too_large
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {error}") from error


class _Answers:
    """The parts of all answers to a request, as they come: an async iterator of (number of the job, part).

    Whatever ends it (the last part, an error, a client that has hung up) cancels what is left. gone: the client has.
    """

    def __init__(self, request, engine: Engine, asked: Asked):
        self._request, self.engine, self.asked = request, engine, asked
        self._queue: asyncio.Queue[tuple[int, Part | Exception] | None] = asyncio.Queue()  # None: the client has gone
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        self.gone = False
        try:
            for number, job in enumerate(asked.jobs):
                self._tickets.append(self._submit(number, job))
        except ValueError as error:
            self.cancel()
            raise Refused(400, str(error)) from error
        except Exception:
            self.cancel()
            raise

    def _submit(self, number: int, job: Job) -> Ticket:
        def deliver(item: Part | Exception) -> None:  # called by the engine's thread
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, item))

        return self.engine.submit(job, deliver)

    def cancel(self) -> None:
        """Nothing more is wanted."""
        for ticket in self._tickets:
            ticket.cancel()

    async def _hang_up(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Part]]:
        left = sum(job.n for job in self.asked.jobs)
        gone = asyncio.ensure_future(self._hang_up())
        try:
            while left:
                following = await self._queue.get()
                if following is None:
                    self.gone = True
                    return
                number, item = following
                if isinstance(item, Exception):
                    raise item
                left -= item.finish is not None
                yield number, item
        finally:
            gone.cancel()
            self.cancel()


async def _events(answers: _Answers) -> AsyncIterator[str]:
    """Server-sent events. An error behind the first event can only be one more event."""
    asked, made = answers.asked, 0
    parts = answers.__aiter__()
    try:
        for event in opening(asked):
            yield _event(event)
        async for number, part in parts:
            made += part.made if part.finish else 0
            yield _event(chunk(asked, number, part, answers.engine))
        for event in closing(asked, made):
            yield _event(event)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(_as_refused(error).body())
    finally:
        await parts.aclose()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def bind(host: str, port: int) -> socket.socket:
    """The socket to listen on, bound before a model is loaded. Raises ValueError for an address that cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host}, port {port} ({error.strerror}); choose others with --host and --port"
        ) from error
    return bound


def server(engine: Engine, name: str, max_body: int = 4_000_000, grace: int = 30):
    """The uvicorn server, not started: ``run(sockets=[bind(...)])`` it. grace: seconds that running answers get when
    it is told to end."""
    import uvicorn

    config = uvicorn.Config(
        application(engine, name, max_body), http="h11", ws="none", lifespan="off", log_level="warning",
        access_log=False, timeout_graceful_shutdown=grace, server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(
    path: str, *, host: str, port: int, name: str | None = None, dtype: str | None = None, max_batch: int = 16,
    max_len: int | None = None, slice_tokens: int = 8, max_waiting: int = 256, max_body: int = 4_000_000,
    grace: int = 30, mesh: jax.sharding.Mesh | None = None, int8: bool = False,
) -> None:  # fmt: skip
    """Load a model and serve it until SIGINT or SIGTERM: then nothing new is taken and running answers end.

    name: of the model in requests (None: the last part of ``path``). mesh, int8: as :class:`Engine` takes them; each
    device reads its own parts of the weights. Raises ValueError and OSError as ``models.load``, :class:`Engine` and
    :func:`bind` do.
    """
    import models
    from jaxrec.chat import has_template

    bound = bind(host, port)
    model = models.load(path, mesh=mesh, dtype=dtype)
    name = name or (Path(path).resolve().name if Path(path).exists() else path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when all is over
    with Engine(
        model, max_batch=max_batch, max_len=max_len, slice_tokens=slice_tokens, max_waiting=max_waiting, mesh=mesh,
        int8=int8,
    ) as engine:  # fmt: skip
        del model  # the engine has the weights in the layout that it needs
        template = "with its chat template" if has_template(engine.tokenizer) else "without a chat template"
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/v1"
        how = [f"{max_batch} answers at a time"]
        if mesh is not None:
            how.append("mesh " + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1))
        if int8:
            how.append("int8")
        bound.listen(2048)  # whoever reads the next line can connect
        print(f"Serving '{name}' {template} at {address}, {', '.join(how)}; Ctrl+C ends", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server(engine, name, max_body, grace).run(sockets=[bound])
    print(f"Served {engine.counts['requests']} requests, {engine.counts['tokens']} tokens")
