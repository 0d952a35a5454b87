"""What the page's server takes, what it refuses, and that nothing is lost which it acknowledged."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from labelling import Client, Server, ranking
from tools import only_line, write_jsonl

from rlhf.label.store import Store
from rlhf.loading import load_tokenizer
from rlhf.models import LanguageModel
from rlhf.records import read_comparisons

ANSWER = {
    "version": 0,
    "seconds": 2.5,
    "ranks": [1, 3, 3],
    "marks": [7, 4, 1],
    "flags": [[], ["opinion", "hallucination"], []],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server for tests that are to leave no answer in it, or do not care."""
    directory = tmp_path_factory.mktemp("shared")
    server = Server(directory / "labels", "--data", write_jsonl(directory / "data.jsonl", ranking(3)))
    yield server
    server.stop()


def by_quality(client, number, name):
    """An answer that can be told from the record: the best is ranked first, and the marks depend on the labeller."""
    _, _, page = client.get(f"/task/{number}")
    found = [int(quality) for quality in re.findall(r"quality (\d)</pre>", page)]
    return {
        "task": number,
        "version": 0,
        "seconds": 1,
        "ranks": [3 - quality for quality in found],
        "marks": [1 + (quality + len(name)) % 7 for quality in found],
        "flags": [["opinion"] if quality == 1 else [] for quality in found],
    }


def check(record):
    """That a record holds what ``by_quality`` answers, in the order of the record's completions."""
    found = [int(text[-1]) for text in record["completions"]]
    assert record["ranks"] == [3 - quality for quality in found]
    assert record["marks"] == [1 + (quality + len(record["labeller"])) % 7 for quality in found]
    assert record["flags"] == [["opinion"] if quality == 1 else [] for quality in found]


def test_answers_are_exported_in_the_order_of_the_record(serve):
    server = serve(ranking(6), "--labels_per_prompt", 2)
    for name in ("Ada", "Бо & Co; <b>"):
        status, headers, _ = Client(server.url).ask("POST", "/sign-in", {"name": f"  {name} "})
        assert (status, headers["set-cookie"].count(";")) == (200, 4)
        client = Client(server.url, name)
        seen = set()
        while (number := client.next()) is not None:
            answer = by_quality(client, number, name)
            seen.add(tuple(answer["ranks"]))
            assert client.post("/rank", answer) == (200, {"saved": number})
        assert len(seen) > 1, "the order is always the same"
    records = server.export()
    assert [(record["origin"], record["labeller"]) for record in records] == [
        (i, name) for i in range(6) for name in ("Ada", "Бо & Co; <b>")
    ]
    for record in records:
        check(record)
        assert record["prompt"] == f"prompt {record['origin']}"


def test_an_answer_that_is_sent_twice_is_one(serve):
    server = serve(ranking(2))
    client = Client(server.url, "Ada")
    number = client.next()
    for _ in range(3):
        assert client.post("/rank", {"task": number, **ANSWER})[0] == 200
    changed = {"task": number, **ANSWER, "ranks": [2, 1, 1]}
    status, said = client.post("/rank", changed)  # as another window would that was opened before
    assert status == 409
    assert said["error"].startswith("You have answered this prompt in another window")
    assert client.post("/rank", {**changed, "version": 1})[0] == 200
    [record] = server.export()
    assert sorted(record["ranks"]) == [1, 1, 2]


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        ("/rank", {"ranks": [1, 2]}, "ranks: there must be one for each of the 3 completions"),
        ("/rank", {"ranks": [0, 1, 2]}, "ranks.0: Input should be greater than or equal to 1"),
        ("/rank", {"marks": [1, 2, 8]}, "marks.2: Input should be less than or equal to 7"),
        ("/rank", {"marks": [1, 2, 2.5]}, "marks.2: Input should be a valid integer"),
        ("/rank", {"marks": [1, 2, "3"]}, "marks.2: Input should be a valid integer"),
        ("/rank", {"flags": [[], [], ["nice"]]}, "flags: there is none of the name 'nice'"),
        ("/rank", {"seconds": -1}, "seconds: Input should be greater than or equal to 0"),
        ("/rank", {"task": 1}, "This prompt was not shown to you"),
        ("/rank", {"task": 10**30}, "task: "),
        ("/rank", {"labeller": "Bo"}, "labeller: Extra inputs are not permitted"),
        (
            "/skip",
            {"task": 0, "version": 0, "seconds": 1, "reason": "bored"},
            "reason: must be one of unclear, expertise",
        ),
        ("/skip", {"task": 0, "version": 0, "seconds": 1, "reason": "other", "note": "\ud800"}, "note: "),
        ("/write", {"task": 0, "version": 0, "seconds": 1, "completion": "x"}, "Here completions are ranked"),
        ("/sign-in", {"name": "\u200b\u0007"}, "name: holds a character that can't be printed"),
        ("/sign-in", {"name": "x" * 65}, "name: String should have at most 64 characters"),
    ],
)
def test_bad_answers(shared, path, change, says):
    client = Client(shared.url, "Ada")
    assert client.next() == 0
    status, said = client.post(path, {"task": 0, **ANSWER, **change} if path == "/rank" else change)
    assert status in (404, 422)
    assert said["error"].startswith(says)
    assert client.next() == 0, "something was kept"


def test_only_the_page_itself_is_let_in(shared):
    client = Client(shared.url, "Ada")
    own = f"http://{client.netloc}"
    body = {"name": "Ada"}
    for origin in (
        "http://evil.example",
        "null",
        "http://[::1",
        "http://localhost:1",
        f"http://evil.{client.netloc}",
        None,
    ):
        assert client.post("/sign-in", body, Origin=origin)[0] == 403, origin
        if origin is not None:
            assert client.get("/", Origin=origin)[0] == 403, origin
    assert client.post("/sign-in", body, Origin=own)[0] == 200
    # Another page may link to this one, but neither load nor frame it, nor hide behind a name of its own.
    assert client.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 303
    for mode in ("no-cors", "cors"):
        assert client.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode=mode)[0] == 403
    for host in ("evil.example", f"evil.example:{shared.port}", "192.168.0.1", "", "[::1", "http://[::1"):
        assert client.get("/", Host=host)[0] in (400, 403), host
    _, headers, _ = client.get("/")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "script-src 'self'" in headers["content-security-policy"]


def test_a_name_is_checked_wherever_it_comes_from(shared):
    """A cookie can be made by hand."""
    for name in ("\x1b[31mred\nline", "x" * 65, " spaces ", "\u202egnp"):
        assert "Who are you?" in Client(shared.url, name).get("/")[2]
    persian = "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🚀"
    assert Client(shared.url).post("/sign-in", {"name": persian}) == (200, {"name": persian})
    assert Client(shared.url, persian).get("/")[0] == 303


def test_sizes_are_limited(shared):
    client = Client(shared.url, "Ada")
    client.next()
    status, said = client.post("/sign-in", b'{"name": "' + b"x" * (1 << 20) + b'"}')
    assert (status, said) == (413, "This is more than 1 MiB, which is not taken.\n")
    connection = http.client.HTTPConnection(client.netloc, timeout=10)  # whose length is not said beforehand
    chunks = (b"x" * 65536 for _ in range(40))
    headers = {"Origin": f"http://{client.netloc}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/sign-in", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has answered and closed before all was sent
    assert Client(shared.url).get("/")[0] == 200


@pytest.mark.parametrize("path", ["/task/1", "/task/99", f"/task/{10**30}", "/task/x", "/nothing", "/openapi.json"])
def test_pages_that_are_not_there(shared, path):
    status, headers, text = Client(shared.url, "Ada").get(path)
    assert status == 404
    assert headers["content-type"].startswith("text/html")
    assert "Traceback" not in text


def test_elsewhere_than_on_localhost_a_token_is_required(serve):
    server = serve(ranking(2), "--host", "0.0.0.0")
    address, token = server.url.split("?token=")
    port = server.port
    here = f"http://127.0.0.1:{port}/"
    client = Client(here, "Ada")
    for path in ("/", "/task/0", "/answers", "/static/label.js", "/?token=", f"/?token={token[:-1]}"):
        status, _, text = client.get(path)
        assert status == 403
        assert "token" in text
        assert token not in text
    assert client.post("/rank", {"task": 0, **ANSWER})[0] == 403
    status, headers, _ = client.get(f"/?token={token}")
    assert (status, headers["location"]) == (303, "/")
    name, value = headers["set-cookie"].split(";")[0].split("=", 1)
    client.cookies[name] = value
    assert "HttpOnly" in headers["set-cookie"]
    assert client.next() == 0
    assert client.post("/rank", {"task": 0, **ANSWER})[0] == 200
    assert client.post("/rank", {"task": 0, **ANSWER}, Origin="http://evil.example")[0] == 403
    server.stop()
    server.start()
    assert server.url == f"{address}?token={token}", "a page that is open must go on working"
    assert client.next() == 1


def test_the_end_says_where_the_answers_are(serve):
    server = serve(ranking(2))
    client = Client(server.url, "Ada")
    client.post("/rank", {"task": client.next(), **ANSWER})
    said = server.stop(signal.SIGINT)
    assert server.status == 0
    assert f"label: 1 answers in {server.directory}/labels.sqlite; the same command goes on" in said
    assert "Traceback" not in said


@pytest.mark.long_for(kills=[20])
@pytest.mark.parametrize("kills", [3, 20])
def test_nothing_acknowledged_is_lost_when_the_server_is_killed(serve, kills):
    server = serve(ranking(4000), "--labels_per_prompt", 2)
    draw = random.Random(kills)
    names = ["Ada", "Bo", "Cleo", "Dee"]
    acknowledged = {name: [] for name in names}
    stop = threading.Event()
    unexpected = []

    def answers(name):
        client = Client(server.url, name)
        while not stop.is_set():
            try:
                number = client.next()
                answer = by_quality(client, number, name)
                status, said = client.post("/rank", answer)
                if status == 200:
                    acknowledged[name].append(said["saved"])
                else:
                    unexpected.append((status, said))
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)  # the server was killed just now
            except BaseException as error:
                unexpected.append(error)
                raise

    threads = [threading.Thread(target=answers, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        before = sum(map(len, acknowledged.values()))
        while sum(map(len, acknowledged.values())) == before and not unexpected:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        server.stop(signal.SIGKILL)
        server.start()
    stop.set()
    for thread in threads:
        thread.join()
    assert not unexpected
    records = server.export()
    given = [(record["origin"], record["labeller"]) for record in records]
    assert len(given) == len(set(given)), "an answer is doubled"
    for record in records:
        check(record)
    for name in names:
        mine = acknowledged[name]
        assert len(mine) == len(set(mine))
        assert set(mine) <= {number for number, who in given if who == name}
    counts = [sum(number == i for number, _ in given) for i in {number for number, _ in given}]
    assert max(counts) <= 2


# The command -----------------------------------------------------------------------------------------------------


def test_command(rlhf, serve, tmp_path):
    server = serve(ranking(3), "--labels_per_prompt", 2)
    for name in ("Ada", "Bo"):
        client = Client(server.url, name)
        for number in range(3):
            assert client.next() == number
            answer = by_quality(client, number, name)
            if name == "Bo":  # who ties the two best
                answer["ranks"] = [max(1, rank - 1) for rank in answer["ranks"]]
            client.post("/rank", answer)
    labels = tmp_path / "labels"
    code, error = rlhf("label", "--output_dir", labels, "--report", "--export", tmp_path / "out/e.jsonl")
    assert code == 0, error
    assert "label: 6 records in" in error
    # Nine pairs, of which Bo tied three; all of the others are agreed on, in three prompts.
    assert "Agreement between labellers: 100.0% [43.8%, 100.0%] (the paper's labellers: 72.6 ± 1.5 %" in rlhf.out
    assert "6 answers to 3 of 3 prompts, 0 skipped." in rlhf.out
    assert re.search(r"\| Ada \| 3 \| 0 \| 1 s \| 100.0% ", rlhf.out)
    assert "| Expresses an opinion | 33.3% |" in rlhf.out

    database = labels / "labels.sqlite"
    for target, reason in [
        (database, "is where the answers are kept"),
        (f"{database}-wal", "is where the answers are kept"),
        (labels, "is there, and is no file"),
        ("/dev/full", "is there, and is no file"),
    ]:
        code, error = rlhf("label", "--output_dir", labels, "--export", target)
        assert only_line(error) == f"rlhf label: error: export: {target} {reason}"
    assert len(server.export()) == 6

    occupied = ["label", "--output_dir", labels, "--port", server.port]
    code, error = rlhf(*occupied)
    assert code == 2
    assert re.match(rf"rlhf label: error: host, port: 127.0.0.1:{server.port} can't be listened on: ", only_line(error))
    code, error = rlhf("label", "--output_dir", labels, "--port", 0, "--task", "preference")
    assert only_line(error) == (
        f"rlhf label: error: task: is preference, but {labels}/labels.sqlite was begun with ranking"
    )


def test_command_errors(rlhf, tmp_path, monkeypatch):
    said = "rlhf label: error: "
    none = ["label", "--output_dir", tmp_path / "none"]
    for words, expected in [
        (["--report"], f"output_dir: {tmp_path}/none holds no labels"),
        (["--export", "x.jsonl"], f"output_dir: {tmp_path}/none holds no labels"),
        ([], "data: is [], must be at least one file or data set, where no labels were begun"),
        (["--port", 70000], "port: is 70000, must be from 0 to 65535"),
        (["--labels_per_prompt", 0], "labels_per_prompt: is 0, must be at least 1"),
    ]:
        code, error = rlhf(*none, *words)
        assert (code, only_line(error)) == (2, said + expected)
    assert not (tmp_path / "none").exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "completions": ["x", "y"]}\n{"prompt": "p", "completions": ["x"]}\n')
    code, error = rlhf(*none, "--data", bad)
    assert only_line(error) == f"{said}{bad}:2: field 'completions': has 1 entry, expected 2 to 26"
    good = write_jsonl(tmp_path / "good.jsonl", ranking(2))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, error = rlhf(*none, "--data", good, "--port", taken.getsockname()[1])
    assert "can't be listened on" in only_line(error)
    assert not (tmp_path / "none/labels.sqlite").exists(), "a start that failed has begun something"
    Store(tmp_path / "none/labels.sqlite").close()
    code, error = rlhf(*none, "--export", tmp_path / "e.jsonl")
    assert only_line(error) == f"{said}export: {tmp_path}/none/labels.sqlite holds no answers yet"


def test_report_of_models(rlhf, serve, tmp_path):
    """Win rates between models whichever order a record has them in. Records that name none are left out."""
    records = [
        {"prompt": "a", "completions": ["quality 1", "quality 0"], "models": ["good", "bad"]},
        {"prompt": "b", "completions": ["quality 0", "quality 1"], "models": ["bad", "good"]},
        {"prompt": "c", "completions": ["quality 1", "quality 0"]},
        {"prompt": "d", "completions": ["quality 1", "quality 0"], "models": [{"n": 1}, {"n": 2}]},
        {"prompt": "e", "completions": ["quality 1", "quality 0"], "models": ["good", "bad"]},
    ]
    server = serve(records, "--task", "preference")
    client = Client(server.url, "Ada")
    for number in range(4):
        client.next()
        client.post("/rank", by_quality(client, number, "Ada") | {"marks": [4, 4]})
    skipped = {"task": client.next(), "version": 0, "seconds": 1, "reason": "other", "note": "Both are\n| odd."}
    assert client.post("/skip", skipped)[0] == 200
    code, error = rlhf("label", "--output_dir", tmp_path / "labels", "--report")
    assert code == 0, error
    assert re.search(r"\| bad is preferred to good \| 0.0% \[0.0%, 65.8%\] \|", rlhf.out)
    assert "good is preferred" not in rlhf.out
    assert "* Ada, prompt 5: Both are | odd." in rlhf.out
    assert "1 × Another reason" in rlhf.out


def test_people_judge_an_evaluation(rlhf, base, reward_model, data, tmp_path):
    """The first four commands of docs/evaluation.md: the win rate is what the labellers said."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(Path(data.prompts).read_text().splitlines(keepends=True)[:6]))
    other = tmp_path / "other"
    model = LanguageModel.load(base)
    with torch.no_grad():
        model.model.transformer.wte.weight.mul_(-1)
    model.save(other, load_tokenizer(base))
    command = ["evaluate", "--model", other, "--baseline", base, "--prompts", prompts, "--device", "cpu"]
    command += ["--lengths.max_prompt_tokens", 16, "--lengths.max_response_tokens", 8]
    assert rlhf(*command, "--output_dir", tmp_path / "first")[0] == 0
    completions = tmp_path / "first/completions.jsonl"
    records = [json.loads(line) for line in completions.read_text().splitlines()]
    server = Server(tmp_path / "labels", "--data", completions, "--task", "preference", "--labels_per_prompt", 2)
    wanted = []
    try:
        for name, likes_first in (("Ada", [1, 1, 0, 1, 0, 1]), ("Bo", [1, 0, 0, 1, 0, 1])):
            client = Client(server.url, name)
            for number, first in enumerate(likes_first):
                assert client.next() == number
                page = client.get(f"/task/{number}")[2]
                shown = re.findall(
                    r'aria-label="Completion \w">\n(.*?)</pre>|<p class="text note">\((empty)\)', page, re.S
                )
                texts = ["" if empty else text for text, empty in shown]
                best = records[number]["completions"][0 if first else 1]
                ranks = [1 if text == best else 2 for text in texts]
                marks = [6 if text == best else 3 for text in texts]
                body = {"task": number, "version": 0, "seconds": 1, "ranks": ranks, "marks": marks, "flags": [[], []]}
                assert client.post("/rank", body)[0] == 200
            wanted.append(likes_first)
        people = tmp_path / "people.jsonl"
        people.write_text("".join(json.dumps(record) + "\n" for record in server.export()))
    finally:
        server.stop()
    assert rlhf(*command, "--judge", people, "--output_dir", tmp_path / "judged")[0] == 0
    figures = json.loads((tmp_path / "judged/results.json").read_text())
    [mine] = figures["models"]
    expected = sum(sum(likes) for likes in wanted) / 12
    assert mine["win_rate"]["rate"] == pytest.approx(expected)
    assert mine["mark"] == pytest.approx(3 + 3 * expected)
    assert mine["mark_over_baseline"]["mean"] == pytest.approx(6 * expected - 3)
    # Those with a blank completion are for people to judge, but not for a reward model to learn from.
    assert len(read_comparisons(people)) == 2 * sum(all(record["completions"]) for record in records)
