"""What the page lets in: requests of this page alone, of limited size, and elsewhere than on localhost with a token."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

Scope: TypeAlias = MutableMapping[str, Any]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]

LARGEST_REQUEST = 1 << 20
"""Bytes of a request's body."""
TOO_LARGE = f"This is more than {LARGEST_REQUEST >> 20} MiB, which is not taken."
HEADERS = {
    # No script and no style but the page's own files: whatever a model wrote can't run, even if it were markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Stands before the page, and refuses what does not come from it.

    Args:
        app: the page.
        token: what a browser must show once, in the address; None on localhost.
        cookie: the name under which a browser keeps the token.
    """

    def __init__(self, app: Any, *, token: str | None, cookie: str):
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, of ASGI's interface."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        request = Request(scope)
        refusal = self.refusal(request)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
            return
        await self.app(scope, limited(receive), with_headers)

    def refusal(self, request: Request) -> Response | None:
        """The answer to a request that is not let in; None if it is."""
        headers = request.headers
        netloc = headers.get("host", "")
        if self.token is None and not is_local(part_of(f"//{netloc}", "hostname")):
            # A name that another's DNS points to this machine is another origin to the browser, but not to us.
            return PlainTextResponse(f"This page is for localhost, not {netloc!r}.\n", 403)
        if not same_origin(headers, netloc, reads=request.method in ("GET", "HEAD")):
            return PlainTextResponse("This request comes from another page.\n", 403)
        if int(headers.get("content-length", "0") or 0) > LARGEST_REQUEST:
            return PlainTextResponse(TOO_LARGE + "\n", 413)
        return None if self.token is None else self.check_token(request, self.token)

    def check_token(self, request: Request, token: str) -> Response | None:
        """Lets a browser in that has the token, and takes it out of the address."""
        if equal(request.cookies.get(self.cookie, ""), token):
            return None
        if request.method == "GET" and equal(request.query_params.get("token", ""), token):
            rest = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "token"])
            response = RedirectResponse(request.url.path + (f"?{rest}" if rest else ""), 303)
            response.set_cookie(self.cookie, token, httponly=True, samesite="lax", max_age=90 * 24 * 3600)
            return response
        return PlainTextResponse("Open the whole address that `rlhf label` printed: it ends with a token.\n", 403)


def same_origin(headers: Mapping[str, str], netloc: str, *, reads: bool) -> bool:
    """Whether a request was made by our own page, or by a person who opens it.

    A browser always says from which page a request that changes something comes. Reading is what a link elsewhere does
    as well; other pages than the opened one may not.
    """
    origin = headers.get("origin")
    if origin is not None:
        return part_of(origin, "netloc") == netloc
    if not reads:
        return False
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
    return site in ("none", "same-origin") or mode == "navigate"


def part_of(url: str, part: str) -> str:
    """A part of an address; nothing if it is none."""
    try:
        return getattr(urlsplit(url), part) or ""
    except ValueError:
        return ""


def equal(given: str, token: str) -> bool:
    """Compares in a time that tells nothing about the token."""
    return secrets.compare_digest(given.encode(), token.encode())


def limited(receive: Receive) -> Receive:
    """Counts the bytes of a body whose length was not said, or falsely."""
    seen = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > LARGEST_REQUEST:
            raise HTTPException(413, TOO_LARGE)  # which the page answers
        return message

    return counted
