"""The application: routes, errors in one form, the guard and the log around it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from hipa_deploy.serve.arrivals import Arrivals
from hipa_deploy.serve.service import GoneError, ImageService
from hipa_deploy.serve.settings import LEAST_UPLOADS
from hipa_deploy.serve.web import openai_routes, own_routes, page_routes
from hipa_deploy.serve.web.answering import DirectRoute
from hipa_deploy.serve.web.api_errors import ApiError, error_response
from hipa_deploy.serve.web.guard import Guard, as_sent, check_names
from hipa_deploy.serve.web.request_log import LOG, RequestLog


def web_app(
    service: ImageService,
    *,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    keys: Sequence[str] = (),
    log_prompts: bool = False,
    arrivals: Arrivals | None = None,
) -> ASGIApp:
    """The ASGI application of a service.

    Args:
        service: what makes the images; whoever calls this loads and closes it.
        hosts: names that a Host header may have, beside IP addresses and localhost.
        origins: of other sites whose pages may use the service, such as 'https://example.org'.
        keys: API keys; without any, everybody who reaches the service may use it.
        log_prompts: write prompts to the log.
        arrivals: of the service, where the server before the application counts them too.

    Raises:
        HipaError: a host or an origin that no request can have.

    Example:
        >>> service = ImageService(Models(["emoji"]), Limits())
        >>> service.load("auto")
        >>> app = web_app(service)

    """
    check_names(hosts, origins)
    # No pages of documentation: they would load scripts from another host.
    # No redirections either: behind a proxy with TLS they would lead to plain HTTP.
    app = FastAPI(title="hipa-deploy", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.log_prompts = log_prompts
    app.include_router(openai_routes.router)
    app.include_router(own_routes.router)
    app.include_router(page_routes.router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(GoneError, _gone)
    app.add_exception_handler(Exception, _bug)
    guarded: ASGIApp = Guard(
        _ImageRoutes(app),
        hosts=hosts,
        origins=origins,
        keys=keys,
        open_paths=page_routes.open_paths(),
        body=service.limits.body,
        arrivals=arrivals or Arrivals(service.full),
        # More than there are places in the queues would be uploaded for nothing.
        uploads=max(LEAST_UPLOADS, service.limits.queue * len(service.models.served)),
    )
    if origins:
        # Around the guard: a page of such a site must be able to read its refusals too.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=[as_sent(origin) for origin in origins],
            allow_methods=["GET", "POST"],
            # What the browser asks for: OpenAI's client for JavaScript sends a dozen of its own.
            allow_headers=["*"],
            # Chromium before 142 asks for it where a public site calls a machine of a private
            # network. Without it Starlette answers 400 to the whole question.
            allow_private_network=True,
            expose_headers=["x-request-id", "x-hipa-seed", "server-timing", "retry-after"],
        )
    return _with_head(RequestLog(guarded, service.metrics))


def _with_head(app: ASGIApp) -> ASGIApp:
    """Answer HEAD as GET; the server leaves the body out, and FastAPI knows no HEAD of its own."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # A copy: the server looks at its own to know that no body follows.
            scope = {**scope, "method": "GET"}
        await app(scope, receive, send)

    return answer


class _ImageRoutes:
    """Answers requests for images, and leaves all others to the framework.

    The framework's middleware and routing are for what these routes do not have: dependencies,
    parameters in the path, answers to check. Between two images the processor's caches hold the
    networks' weights, so that every function on the way costs many times what it does in a loop.

    Args:
        app: the framework's application, which has these routes too, for its description of them.

    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._routes = {route.path: route for route in _image_routes()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        # Behind a prefix of a proxy the path is not the route's: the framework knows the rules.
        route = None
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            route = self._routes.get(scope["path"])
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            response = await route.answer(request)
        except HTTPException as error:
            response = await _http_error(request, error)
        except GoneError as error:
            response = await _gone(request, error)
        except Exception as error:
            response = await _bug(request, error)
        await response(scope, receive, send)


def _image_routes() -> list[DirectRoute]:
    """The routes of the requests for images."""
    routes = []
    for route in (*openai_routes.router.routes, *own_routes.router.routes):
        if isinstance(route, DirectRoute) and "POST" in (route.methods or ()):
            routes.append(route)
    return routes


def image_paths() -> list[str]:
    """The paths of the requests for images."""
    return [route.path for route in _image_routes()]


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """An ``ApiError`` of a route, or what the framework says of paths and methods."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        request.scope["error"] = error.code
        return error.response()
    words = {404: "There is nothing under this path.", 405: "This path has another method."}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    request.scope["error"] = code
    message = words.get(error.status_code, "The request cannot be read.")
    return error_response(error.status_code, message, code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    """The client went away while its request was read; nobody reads this."""
    request.scope["error"] = "client_closed"
    return error_response(499, "The client went away.", "client_closed")


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """A bug: the client learns that it was one, the log learns which."""
    request.scope["error"] = "internal_error"
    LOG.error("bug", exc_info=error)
    return error_response(500, "The service failed. Its log says why.", "internal_error")
