"""The page: what a labeller sees of a task, and how an answer comes in."""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from rlhf.label import tasks
from rlhf.label.guard import Guard
from rlhf.label.store import Answer, ChangedError, NotYoursError, Store
from rlhf.label.tasks import FLAGS, LETTERS, MARKS, SKIP_REASONS, Kind, as_recorded, as_shown, without_gaps

HERE = Path(__file__).parent
LABELLER = "labeller"
"""The cookie with the labeller's name."""
LONGEST_NAME = 64
JOINERS = re.compile("[\u200c\u200d]")


class Body(BaseModel):
    """What a request holds. Nothing else may be in it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SignIn(Body):
    """A labeller's name."""

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_NAME)]


Number = Annotated[int, Field(ge=0, lt=2**31)]
"""Of a task."""
Version = Annotated[int, Field(ge=0)]
"""How many times the answer had been given that the labeller saw."""
Seconds = Annotated[float, Field(ge=0, le=7 * 24 * 3600, allow_inf_nan=False)]


class Ranked(Body):
    """Marks, flags and ranks of a task's completions, in the order in which they were shown."""

    task: Number
    version: Version
    seconds: Seconds
    ranks: list[Annotated[int, Field(ge=1, le=len(LETTERS))]]
    marks: list[Annotated[int, Field(ge=MARKS[0], le=MARKS[-1])]]
    flags: list[list[str]]


class Written(Body):
    """The answer to a prompt."""

    task: Number
    version: Version
    seconds: Seconds
    completion: str


class Skipped(Body):
    """Why a task was not answered."""

    task: Number
    version: Version
    seconds: Seconds
    reason: str
    note: Annotated[str, StringConstraints(max_length=2000)] = ""


def refused(message: str, status: int = 422) -> HTTPException:
    """An answer that is not taken, with what to do about it."""
    return HTTPException(status, message)


def make_app(store: Store, kind: Kind, *, labels_per_prompt: int, seed: int, token: str | None) -> Any:
    """The page as an ASGI application."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    templates.filters["visible"] = tasks.visible
    templates.globals.update(flags=FLAGS, marks=MARKS, letters=LETTERS, skip_reasons=SKIP_REASONS, kind=kind)
    identity = store.setting("id") or ""

    def page(name: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
        who = labeller(request)
        progress = store.progress(who, labels_per_prompt) if who else None
        text = templates.get_template(name).render(labeller=who, progress=progress, **values)
        return HTMLResponse(text.encode("utf-8", "replace"), status)

    def own_task(request: Request, number: int) -> tuple[str, dict[str, Any]]:
        who, task = labeller(request), store.task(number)
        if who is None:
            raise refused("Say who you are first: open the page anew.", 401)
        if task is None or not store.was_shown(number, who):
            raise refused("This prompt was not shown to you.", 404)
        return who, task

    def places_of(task: dict[str, Any], number: int, who: str) -> list[int]:
        return tasks.order(seed, number, who, len(task["completions"]))

    @app.exception_handler(HTTPException)
    def failed(request: Request, error: HTTPException) -> Response:
        if request.method == "POST":
            return JSONResponse({"error": error.detail}, error.status_code)
        return page("message.html", request, error.status_code, message=error.detail)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        if request.method != "POST":
            return page("message.html", request, 404, message="There is no such page.")
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": f"{name}: {first['msg']}"}, 422)

    @app.exception_handler(sqlite3.Error)
    def not_kept(request: Request, error: sqlite3.Error) -> Response:
        if request.method == "POST":
            return JSONResponse({"error": f"The answer could not be kept: {error}."}, 500)
        return PlainTextResponse(f"The database can't be used: {error}.\n", 500)

    @app.get("/")
    def next_page(request: Request) -> Response:
        who = labeller(request)
        if who is None:
            return page("sign_in.html", request)
        number = store.next_task(who, labels_per_prompt)
        if number is None:
            return page("done.html", request)
        return RedirectResponse(f"/task/{number}", 303)

    @app.get("/task/{number}")
    def task_page(request: Request, number: Number) -> Response:
        if labeller(request) is None:
            return RedirectResponse("/", 303)
        who, task = own_task(request, number)
        given = store.answer(number, who)
        values: dict[str, Any] = {"completions": [], "state": {}}
        if kind != "demonstration":
            places = places_of(task, number, who)
            values["completions"] = [tasks.said(each) for each in as_shown(task["completions"], places)]
            if given and given.answer:
                values["state"] = {name: as_shown(value, places) for name, value in given.answer.items()}
        elif given and given.answer:
            values["state"] = given.answer
        return page(
            "task.html",
            request,
            number=number,
            turns=tasks.turns(task["prompt"]),
            tools=json.dumps(task["tools"], ensure_ascii=False, indent=2) if task.get("tools") else "",
            version=given.changes + 1 if given else 0,
            given=given,
            back=store.before(number, who),
            draft=f"{identity} {who} {number}",
            **values,
        )

    @app.get("/answers")
    def answers_page(request: Request) -> Response:
        who = labeller(request)
        if who is None:
            return RedirectResponse("/", 303)
        return page("answers.html", request, rows=[row(store, each) for each in reversed(store.answers(who))])

    @app.post("/sign-in")
    def sign_in(body: SignIn) -> Response:
        name = clean(body.name)
        if name is None:
            raise refused("name: holds a character that can't be printed.")
        response = JSONResponse({"name": name})
        response.set_cookie(LABELLER, quote(name), httponly=True, samesite="lax", max_age=90 * 24 * 3600)
        return response

    @app.post("/sign-out")
    def sign_out(request: Request) -> Response:
        if who := labeller(request):
            store.release(who)
        response = JSONResponse({})
        response.delete_cookie(LABELLER)
        return response

    def keep(body: Any, who: str, **said: Any) -> dict[str, Any]:
        try:
            store.save(body.task, who, body.seconds, version=body.version, **said)
        except NotYoursError:
            raise refused("This prompt was not shown to you.", 404) from None
        except ChangedError:
            reason = "You have answered this prompt in another window meanwhile; load the page anew to see that."
            raise refused(reason, 409) from None
        return {"saved": body.task}

    @app.post("/rank")
    def rank(request: Request, body: Ranked) -> dict[str, Any]:
        if kind == "demonstration":
            raise refused("Here demonstrations are written.", 404)
        who, task = own_task(request, body.task)
        count = len(task["completions"])
        for name in ("ranks", "marks", "flags"):
            if len(getattr(body, name)) != count:
                raise refused(f"{name}: there must be one for each of the {count} completions.")
        if unknown := {flag for flags in body.flags for flag in flags} - FLAGS.keys():
            raise refused(f"flags: there is none of the name {min(unknown)!r}.")
        places = places_of(task, body.task, who)
        flags = [[name for name in FLAGS if name in given] for given in body.flags]
        answer: dict[str, list[Any]] = {"ranks": without_gaps(body.ranks), "marks": body.marks, "flags": flags}
        recorded = {name: as_recorded(values, places) for name, values in answer.items()}
        return keep(body, who, answer=recorded)

    @app.post("/write")
    def write(request: Request, body: Written) -> dict[str, Any]:
        if kind != "demonstration":
            raise refused("Here completions are ranked.", 404)
        who, _ = own_task(request, body.task)
        if not body.completion.strip():
            raise refused("completion: is empty.")
        return keep(body, who, answer={"completion": body.completion})

    @app.post("/skip")
    def skip(request: Request, body: Skipped) -> dict[str, Any]:
        who, _ = own_task(request, body.task)
        if body.reason not in SKIP_REASONS:
            raise refused(f"reason: must be one of {', '.join(SKIP_REASONS)}.")
        return keep(body, who, skipped={"reason": body.reason, "note": body.note.strip()})

    @app.get("/favicon.ico")
    def icon() -> Response:
        return PlainTextResponse("", 404)

    return Guard(app, token=token, cookie=f"token-{identity}")


def labeller(request: Request) -> str | None:
    """Who makes a request, as they said themselves."""
    name = unquote(request.cookies.get(LABELLER, ""))
    return name if name and len(name) <= LONGEST_NAME and clean(name) == name else None


def clean(name: str) -> str | None:
    """A name in one way of writing it; None if it holds what can't be printed, but for what joins letters."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    return name if JOINERS.sub("", name).isprintable() else None


def row(store: Store, given: Answer) -> dict[str, Any]:
    """An answer in the list of a labeller's answers."""
    task = store.task(given.number) or {"prompt": ""}
    asked = " ".join(text for _, text in tasks.turns(task["prompt"]))
    return {"number": given.number, "prompt": asked[:200], "skipped": given.skipped, "changes": given.changes}
