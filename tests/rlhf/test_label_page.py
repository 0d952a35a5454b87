"""What labellers do, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
from labelling import Server, ranking
from test_label_server import check
from tools import run_here

from rlhf.records import read_demonstrations

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ARGUMENTS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
ROOT = Path(__file__).parents[2]
AXE = ROOT / "build/node_modules/axe-core/axe.min.js"
FROGS = [
    "The frog sat still, and thought of rain.",
    "Frogs are amphibians of the order Anura.",
    "I can't write poems.",
    "A frog once knew what ponds don't know:\nthat every ring was once a stone.",
]


def launch(play):
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which Chromium refuses to have as root
    return play.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *sandbox])


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as play:
        browser = launch(play)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Opens the page: ``page = browse(server, "Ada")``. An error of the page's own code fails the test."""
    contexts, errors = [], []

    def open_page(server, name, **options):
        contexts.append(chromium.new_context(viewport={"width": 1000, "height": 1900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.goto(server.url)
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_url("**/task/*")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def shown(page):
    """The completions in the order of the page."""
    return page.locator(".completion pre").all_text_contents()


def card(page, i):
    return page.locator(f"#board .card[data-index='{i}']")


def middle(box):
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page, i, rank):
    """Takes a card with the mouse and lays it into a rank."""
    page.locator("#board").evaluate("board => board.scrollIntoView({block: 'center'})")
    start = card(page, i).locator("strong").bounding_box()
    page.mouse.move(*middle(start))
    page.mouse.down()
    page.mouse.move(*middle(page.locator(f".rank[data-rank='{rank}']").bounding_box()), steps=4)
    page.mouse.up()


def save(page):
    """Saves, and waits for the next task."""
    before = page.url
    page.get_by_role("button", name="Save and go on").click()
    page.wait_for_url(lambda url: url != before)
    page.wait_for_load_state()


def test_a_labeller_ranks(serve, browse):
    """Three prompts by dragging, one by keyboard alone, two ties, marks and flags; then back, and one is changed."""
    records = [{"prompt": f"Write a poem about a wise frog, number {i}.", "completions": FROGS} for i in range(5)]
    server = serve(records)
    page = browse(server, "Ada")
    wanted = []  # of every prompt: text → (rank, mark, flags)
    orders = []
    for number, ranks in enumerate(([1, 2, 3, 4], [2, 1, 2, 3], [4, 4, 1, 2])):  # the last leaves rank 3 empty
        assert page.locator("h1").text_content() == f"Prompt {number + 1}"
        assert page.locator(".prompt pre").text_content() == records[number]["prompt"]
        texts = shown(page)
        orders.append(tuple(texts))
        flags = [["opinion"], [], ["hallucination", "fails_instruction"], []]
        for i in range(4):
            page.check(f"[name=mark-{i}][value='{7 - i}']")
            if flags[i]:
                page.locator(f".completion[data-index='{i}'] summary").click()
            for flag in flags[i]:
                page.check(f"[name=flag-{i}][value={flag}]")
            drag(page, i, ranks[i])
            assert card(page, i).locator("select").input_value() == str(ranks[i])
        wanted.append({text: (ranks[i], 7 - i, sorted(flags[i])) for i, text in enumerate(texts)})
        save(page)
    wanted[2] = {text: ({4: 3}.get(rank, rank), *rest) for text, (rank, *rest) in wanted[2].items()}
    assert len(set(orders)) > 1
    assert all(sorted(order) == sorted(FROGS) for order in orders)

    # By keyboard alone, without a rank at first: the page says what is missing, and goes there.
    texts, keyboard = shown(page), page.keyboard
    page.locator("#main").focus()
    for i in range(4):
        press_until(page, f"[name=mark-{i}]")
        keyboard.press("Space")
        for _ in range(i):
            keyboard.press("ArrowRight")
    press_until(page, "button.main")
    keyboard.press("Enter")
    assert page.locator("#error").text_content() == "A rank is missing: A, B, C, D."
    for i, rank in enumerate([3, 1, 2, 1]):
        press_until(page, f".card[data-index='{i}'] select")
        keyboard.press(str(rank))
        assert page.evaluate("document.activeElement.value") == str(rank)
    press_until(page, "button.main")
    before = page.url
    keyboard.press("Enter")
    page.wait_for_url(lambda url: url != before)
    wanted.append({text: ([3, 1, 2, 1][i], i + 1, []) for i, text in enumerate(texts)})

    # Back twice, to the third prompt. What was said is there, and one thing is changed.
    page.click("#back")
    page.wait_for_url("**/task/3")
    page.click("#back")
    page.wait_for_url("**/task/2")
    texts = shown(page)
    assert tuple(texts) == orders[2], "the order has changed"
    for i, text in enumerate(texts):
        rank, mark, flags = wanted[2][text]
        assert card(page, i).locator("select").input_value() == str(rank)
        assert page.is_checked(f"[name=mark-{i}][value='{mark}']")
        assert sorted(box.get_attribute("value") for box in page.locator(f"[name=flag-{i}]:checked").all()) == flags
    page.check("[name=mark-0][value='1']")
    drag(page, 0, 1)
    rank, mark, flags = wanted[2][texts[0]]
    wanted[2][texts[0]] = (1, 1, flags)
    wanted[2] = {text: ({1: 1, 2: 2, 3: 3}[r], *rest) for text, (r, *rest) in wanted[2].items()}
    save(page)

    page.locator("#skip summary").click()
    page.get_by_role("button", name="Skip", exact=True).click()
    assert page.locator("#error").text_content() == "Say why you skip it."
    page.select_option("#reason", "expertise")
    before = page.url
    page.get_by_role("button", name="Skip", exact=True).click()
    page.wait_for_url(lambda url: url != before)
    assert page.locator("h1").text_content() == "Nothing is left for you"
    page.goto(server.url + "answers")
    assert page.locator(".answers li").count() == 5
    assert "skipped: I don't know enough" in page.locator(".answers li").first.text_content()

    exported = server.export()
    assert [record["prompt"] for record in exported] == [record["prompt"] for record in records[:4]]
    for record, expected in zip(exported, wanted, strict=True):
        rows = zip(record["completions"], record["ranks"], record["marks"], record["flags"], strict=True)
        assert {text: (rank, mark, sorted(flags)) for text, rank, mark, flags in rows} == expected
        assert record["completions"] == FROGS
        assert record["labeller"] == "Ada"
        assert 0 < record["seconds"] < 600


def press_until(page, selector):
    """Presses Tab until an element has the focus."""
    for _ in range(80):
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} can't be reached by Tab")


def test_touch(serve, browse):
    server = serve(ranking(1))
    page = browse(server, "Ada", has_touch=True)
    touch = page.context.new_cdp_session(page)

    def point(kind, at):
        touch.send(
            "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [dict(zip("xy", at, strict=True))] if at else []}
        )

    for i, rank in enumerate([2, 1, 2]):
        start = middle(card(page, i).locator(".grip").bounding_box())
        end = middle(page.locator(f".rank[data-rank='{rank}']").bounding_box())
        point("touchStart", start)
        for part in (0.3, 0.7, 1):
            point("touchMove", [a + part * (b - a) for a, b in zip(start, end, strict=True)])
        point("touchEnd", None)
        page.check(f"[name=mark-{i}][value='4']")
    texts = shown(page)
    save(page)
    [record] = server.export()
    ranks = dict(zip(record["completions"], record["ranks"], strict=True))
    assert [ranks[text] for text in texts] == [2, 1, 2]


NASTY = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"></pre><b>bold</b>",
    "\" onmouseover=\"document.title='owned'\" x='",
    "word " * 40_000,
    "שלום עולם \u202egnp.exe\u202c Ende",
    "👩‍👩‍👧 🏳️‍🌈 \x00\x07\x1b[31m\x7f\x85\ttab\r\nline\rline",
    "{{ 7 * 7 }} {% raw %} ${1} &lt;b&gt; \n\n\nend ",
]


def test_completions_are_text(serve, browse):
    from rlhf.label.tasks import visible

    server = serve(
        [
            {"prompt": NASTY[0], "completions": NASTY},
            {"prompt": [{"role": "<b>", "content": NASTY[1]}], "completions": NASTY[:2]},
        ]
    )
    page = browse(server, NASTY[0][:40])
    assert page.title() == "Prompt 1"
    assert sorted(shown(page)) == sorted(map(visible, NASTY))
    assert page.locator(".prompt pre").text_content() == NASTY[0]
    assert page.locator("img, b, main script").count() == 0
    for box in page.locator(".completion pre").all():
        box.hover()
    assert page.title() == "Prompt 1"
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], "the page scrolls sideways"
    for i in range(len(NASTY)):
        page.check(f"[name=mark-{i}][value='4']")
        card(page, i).locator("select").select_option(str(i + 1))
    save(page)
    assert page.locator(".prompt h2").text_content() == "<b>"
    [record] = server.export()
    assert record["completions"] == NASTY


def test_preference(serve, browse):
    server = serve(
        [{"prompt": "p", "completions": ["better", "worse"], "models": ["x", "y"]}] * 3, "--task", "preference"
    )
    page = browse(server, "Ada")
    for value in ("better", "worse", None):
        page.get_by_role("button", name="Save and go on").click()
        assert page.locator("#error").text_content() == "A mark is missing: A, B."
        texts = shown(page)
        for i in range(2):
            page.check(f"[name=mark-{i}][value='{i + 3}']")
        page.get_by_role("button", name="Save and go on").click()
        assert page.locator("#error").text_content() == "Which one is better is missing."
        name = "neither" if value is None else "AB"[texts.index(value)]
        page.locator("#preference").get_by_label(name, exact=True).check()
        assert "x" not in page.locator("header").text_content().split()
        save(page)
    assert [record["ranks"] for record in server.export()] == [[1, 2], [2, 1], [1, 1]]


def test_demonstrations(serve, browse):
    server = serve(
        [{"prompt": "Name a colour.", "id": 7}, {"prompt": [{"role": "user", "content": "Hi"}]}],
        "--task",
        "demonstration",
    )
    page = browse(server, "Ada")
    page.get_by_role("button", name="Save and go on").click()
    assert page.locator("#error").text_content() == "The answer is empty."
    page.fill("#completion", "Blue,\n<b>or</b> green 🐸.")
    save(page)
    page.fill("#completion", "Hello!")
    save(page)
    first, second = server.export()
    assert (first["prompt"], first["completion"], first["id"]) == ("Name a colour.", "Blue,\n<b>or</b> green 🐸.", 7)
    assert (second["prompt"], second["completion"]) == ([{"role": "user", "content": "Hi"}], "Hello!")
    assert [each.completion for each in read_demonstrations([first, second])] == [first["completion"], "Hello!"]


def test_nothing_written_is_lost(serve, browse):
    """Neither when the page is loaded anew, nor when the server is away."""
    server = serve([{"prompt": "p"}, {"prompt": "q"}], "--task", "demonstration")
    page = browse(server, "Ada")
    page.fill("#completion", "A long answer.")
    page.reload()
    assert page.input_value("#completion") == "A long answer."
    server.stop()
    page.get_by_role("button", name="Save and go on").click()
    playwright.expect(page.locator("#error")).to_contain_text("Not saved: ")
    assert page.input_value("#completion") == "A long answer."
    server.start()
    save(page)
    assert page.input_value("#completion") == ""
    page.click("#back")
    page.wait_for_url("**/task/0")
    assert not page.locator("#unsaved").is_visible(), "what was saved is kept as a draft"
    assert [record["completion"] for record in server.export()] == ["A long answer."]


def test_two_windows_of_one_labeller(serve, browse):
    """The later one does not undo what the first has saved."""
    server = serve([{"prompt": "p"}], "--task", "demonstration")
    page = browse(server, "Ada")
    other = page.context.new_page()
    other.goto(page.url)
    page.fill("#completion", "First.")
    save(page)
    other.fill("#completion", "Second.")
    other.get_by_role("button", name="Save and go on").click()
    playwright.expect(other.locator("#error")).to_contain_text("another window")
    assert [record["completion"] for record in server.export()] == ["First."]
    other.reload()
    assert other.input_value("#completion") == "Second."
    assert other.locator("#unsaved").is_visible()
    other.get_by_role("button", name="Discard it").click()
    playwright.expect(other.locator("#completion")).to_have_value("First.")
    assert not other.locator("#unsaved").is_visible()


def test_tools_and_a_browser_without_storage(serve, browse):
    server = serve(
        [{"prompt": [{"role": "user", "content": "2 + 2?"}], "tools": [{"name": "add"}]}] * 2, "--task", "demonstration"
    )
    page = browse(server, "Ada")
    assert '"name": "add"' in page.locator(".prompt").text_content()
    page.add_init_script("Storage.prototype.removeItem = Storage.prototype.setItem = () => { throw Error('denied'); }")
    page.reload()
    page.fill("#completion", "4")
    save(page)
    assert page.locator("h1").text_content() == "Prompt 2"
    assert len(server.export()) == 1


@pytest.mark.long_for(prompts=[100])
@pytest.mark.parametrize("prompts", [6, 100])
def test_four_labellers_at_once(serve, prompts):
    """Each with a browser. Every prompt gets its two answers: none lost, none doubled."""
    server = serve(ranking(prompts), "--labels_per_prompt", 2)
    names = ["Ada", "Bo", "Cleo", "Dee"]
    errors, counts = [], dict.fromkeys(names, 0)

    def labels(name):
        try:
            with playwright.sync_playwright() as play:
                browser = launch(play)
                page = browser.new_page()
                page.goto(server.url)
                page.fill("#name", name)
                page.click("button.main")
                while True:
                    page.wait_for_selector("#task, h1:has-text('Nothing is left')")
                    if page.locator("h1").text_content() == "Nothing is left for you":
                        break
                    for i, text in enumerate(shown(page)):
                        quality = int(text[-1])
                        page.check(f"[name=mark-{i}][value='{1 + (quality + len(name)) % 7}']")
                        card(page, i).locator("select").select_option(str(3 - quality))
                        if quality == 1:
                            page.locator(f".completion[data-index='{i}'] summary").click()
                            page.check(f"[name=flag-{i}][value=opinion]")
                    save(page)
                    counts[name] += 1
                browser.close()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=labels, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    records = server.export()
    assert len(records) == sum(counts.values()) == 2 * prompts
    assert len({(record["origin"], record["labeller"]) for record in records}) == 2 * prompts
    assert all(sum(record["labeller"] == name for record in records) == counts[name] for name in names)
    for record in records:
        check(record)


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm install --prefix build axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["ranking", "preference", "demonstration"])
def test_accessibility(serve, browse, kind, scheme):
    server = serve(ranking(2, 2), "--task", kind)
    page = browse(server, "Ada", color_scheme=scheme, bypass_csp=True)

    def faults():
        page.add_script_tag(path=AXE)
        found = page.evaluate("axe.run()")
        assert found["passes"]
        return [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found["violations"]]

    page.locator("#skip summary").click()
    for flags in page.locator(".flags summary").all():
        flags.click()
    assert faults() == []
    page.get_by_role("button", name="Save and go on").click()
    assert faults() == []
    page.select_option("#reason", "unclear")
    page.get_by_role("button", name="Skip", exact=True).click()
    page.wait_for_url("**/task/1")
    for path in ("answers", "task/99"):
        page.goto(server.url + path)
        assert faults() == []
    page.get_by_role("button", name="Change name").click()
    page.wait_for_selector("#name")
    assert faults() == []


@pytest.mark.runs("pairwise_ranking_loss")
def test_from_a_model_to_a_reward_model(browse, base, data, tmp_path, monkeypatch):
    """The commands of docs/label.md, with a labeller between them."""
    page = (ROOT / "docs/label.md").read_text()
    commands = [line.split("#")[0].split()[1:] for line in re.search(r"```sh\n(.*?)```", page, re.S)[1].splitlines()]
    assert [words[0] for words in commands] == ["generate", "label", "label", "label", "reward"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/model").symlink_to(base)
    prompts = Path(data.prompts).read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(prompts[:3]))

    generate, label, report, export, reward = commands
    short = ["--device", "cpu", "--lengths.max_prompt_tokens", "16", "--lengths.max_response_tokens", "8"]
    assert run_here(*generate, *short) == 0
    at = label.index("--output_dir") + 1
    server = Server(label[at], *label[1 : at - 1], *label[at + 1 :])
    try:
        labeller = browse(server, "Ada")
        for _ in range(3):
            for i in range(4):
                labeller.check(f"[name=mark-{i}][value='{i + 1}']")
                drag(labeller, i, 4 - i)
            save(labeller)
    finally:
        server.stop(signal.SIGTERM)
    assert run_here(*report) == 0
    assert run_here(*export) == 0
    assert run_here(*reward, "--device", "cpu", "--batch_size", 2) == 0
    assert (tmp_path / "runs/reward/model/model.safetensors").exists()
