"""The page in a real browser: typed in, written, read, stopped, copied, by one visitor and by two."""

import json
import urllib.error
import urllib.request

import gradio_client
import pytest

from app import AT_ONCE, KEPT_ENTRIES, MAX_WAITING, read_rooms
from tests.app_toys import (
    BUSY,
    CHROMIUM,
    DESKTOP,
    PATIENCE_SECONDS,
    PHONE,
    chromium,
    fill,
    gated,
    served,
    set_number,
    texts,
    visit,
    write_writer,
    written,
)
from tests.gated import Gate, wait_until

pytest.importorskip("playwright", reason="the browser is driven by playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
LONGER = "was => document.querySelector('#current .boxed')?.innerText.length > was"
SAYS = "words => document.querySelector('#status').innerText.includes(words)"
NOTE_LENGTHS = """
window.lengths = [];
new MutationObserver(() => {
    const room = document.querySelector('#current .boxed');
    if (room) window.lengths.push(room.innerText.length);
}).observe(document.querySelector('#current'), {subtree: true, childList: true, characterData: true});
"""
NOTHING_TYPED = "No field is filled in"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "log"


@pytest.fixture(scope="module")
def gate(log):
    return Gate(log.parent / "gate")


@pytest.fixture(scope="module")
def address(log, gate):
    folder = write_writer(log.parent / "export", n_positions=1024)
    with served(log, command=gated(gate, "--model", str(folder))) as (address, _):
        yield address


@pytest.fixture(scope="module")
def see():
    with chromium() as see:
        yield see


def press_write(page):
    page.click("#write")


def read_copied(page) -> str:
    return page.evaluate("navigator.clipboard.readText()")


def test_rooms_grow_before_the_readers_eyes_and_a_seed_writes_them_again(see, address, gate):
    def look(browser):
        page = visit(browser, address)
        page.evaluate(NOTE_LENGTHS)
        fill(page, setting="sewer", place="bridge", features="a bell, wet rope", exits="north")
        set_number(page, "Seed", 7)
        set_number(page, "Length", 150)
        with gate.closed():
            press_write(page)
            length = 3
            for _ in range(3):
                gate.let(16)
                page.wait_for_function(LONGER, arg=length)
                length = len(texts(page)[0])
        rooms = written(page, "Room 1 is written")
        lengths = page.evaluate("window.lengths")
        assert lengths == sorted(lengths) and len(set(lengths)) > 3, lengths
        assert len(set(rooms)) == 3 and all(len(room) > 40 for room in rooms)
        shown = page.inner_text("#current")
        for words in ("Bridge, sewer", "1a", "1c", "seed 7", "seed 9", "a bell, wet rope", "+ words"):
            assert words.lower() in shown.lower(), shown

        page.click("#current .copy >> nth=1")
        page.wait_for_function("document.querySelectorAll('#current .copy')[1].innerText == 'Copied'")
        copied = read_copied(page).splitlines()
        assert copied[0] == "1b. Bridge, sewer" and copied[2] == rooms[1]
        assert copied[-2:] == ["Features: a bell, wet rope", "Exits: north"]

        page.press("#field-exits input", "Enter")  # the same order, by keyboard
        assert written(page, "Room 2 is written") == rooms
        assert page.eval_on_selector_all("#earlier .boxed", "all => all.map(e => e.innerText)") == rooms
        set_number(page, "Seed", 8)
        set_number(page, "Variants", 1)
        press_write(page)
        assert written(page, "Room 3 is written") == rooms[1:2]  # whoever is beside it
        fill(page, setting="lighthouse", place="", features="")  # the beginnings of another order
        page.click("#again")  # another text for the same number, and the same order
        another = "was => ![was, ''].includes(document.querySelector('#current .boxed').innerText)"
        page.wait_for_function(another, arg=rooms[1])
        again = written(page, "Room 3 is written")
        assert again != rooms[1:2]
        assert page.inner_text("#current h2").lower() == "bridge, sewer"
        assert "a bell, wet rope" in page.inner_text("#current")
        assert "seed 8" not in page.inner_text("#current").lower().splitlines()  # but perhaps 8,717
        assert page.said == []

    see(look)


def test_writing_ends_when_the_visitor_says_so_and_when_the_visitor_leaves(see, address, gate, log):
    def begin(page):
        set_number(page, "Length", 400)
        press_write(page)
        gate.let(8)
        page.wait_for_function(BUSY)

    def look(browser):
        page = visit(browser, address)
        with gate.closed():
            before = len(gate.forwards)
            begin(page)
            assert not page.is_enabled("#write")
            page.click("#stop")
            gate.let_until(lambda: page.evaluate(SAYS, "Stopped"))
            assert len(gate.forwards) - before < 400
        page.wait_for_selector("#current .copy")
        assert not page.is_visible("#stop") and page.is_enabled("#write")

        set_number(page, "Length", 20)
        press_write(page)
        assert len(written(page)) == 3
        with gate.closed():
            before, logged = len(gate.forwards), len(log.read_text())
            begin(page)
            page.context.close()
            gate.let_until(lambda: "broken off" in log.read_text()[logged:])
            assert len(gate.forwards) - before < 400

    see(look)


def test_two_visitors_are_written_for_at_once_and_apart(see, address, gate):
    def look(browser):
        one, other = visit(browser, address), visit(browser, address)
        fill(one, setting="crypt")
        fill(other, setting="lighthouse")
        with gate.closed():
            for page, seed, length in ((one, 1, 400), (other, 2, 60)):
                set_number(page, "Seed", seed)
                set_number(page, "Length", length)
                press_write(page)
            wait_until(lambda: gate.waiting == 2)  # neither has to wait for the other
            gate.let_until(lambda: other.evaluate(SAYS, "Room 1 is written"))
            theirs = texts(other)
            gate.let_until(lambda: one.evaluate(BUSY))  # still: it was asked for more
            one.click("#stop")
            gate.let_until(lambda: one.evaluate(SAYS, "Stopped"))
            mine = texts(one)
        assert "Lighthouse" in other.inner_text("#current") and "Crypt" in one.inner_text("#current")
        press_write(other)  # alone now
        assert written(other, "Room 2 is written") == theirs
        fill(other, setting="crypt")
        set_number(other, "Seed", 1)
        press_write(other)
        alone = written(other, "Room 3 is written")
        assert all(mine) and all(b.startswith(a[:10]) for a, b in zip(mine, alone, strict=True))
        assert theirs != alone

    see(look)


def test_the_dice_fill_the_fields_with_a_room_of_the_corpus(see, address):
    settings = {room["setting"] for room in read_rooms()}

    def look(browser):
        page = visit(browser, address)
        rolled = set()
        while len(rolled) < 3:
            page.click("#dice")
            another = "was => !was.includes(document.querySelector('#field-title input').value)"
            page.wait_for_function(another, arg=["", *rolled])
            rolled.add(page.input_value("#field-title input"))
            assert page.input_value("#field-setting input") in settings
            assert page.input_value("#field-features input")

    see(look)


def test_whatever_is_typed_is_text_bounded_and_in_no_log(see, address, log):
    hostile = '<img src=x onerror="window.hurt=1"> {{constructor}} ${window.hurt=2} </p>'

    def look(browser):
        page = visit(browser, address)
        page.set_viewport_size(PHONE)
        set_number(page, "Length", 20)
        press_write(page)
        written(page)
        assert NOTHING_TYPED in page.inner_text("#status")
        fill(page, title=hostile, setting="xyzzy\x07\x1b[2J\u202e 🐀👩‍🚒", place="W" * 100_000)
        assert page.input_value("#field-place input") == "W" * 160
        press_write(page)
        written(page, "Room 2 is written")
        assert page.inner_text("#current h2").lower() == hostile.lower()
        subtitle = page.inner_text("#current header p")
        assert (
            "🐀👩‍🚒" in subtitle
            and "\x1b" not in subtitle
            and "W" * 160 in subtitle
            and "W" * 161 not in subtitle
        )
        assert page.locator("#current img").count() == 0 and page.evaluate("window.hurt") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.said == [] and page.outside == []

    see(look)
    # Past the browser: the server bounds what it is sent.
    client = gradio_client.Client(address, verbose=False)
    typed = ["", hostile, "W" * 100_000, "xyzzy", "", "", ""]
    status, current, *_ = client.predict(*typed, "9" * 100_000, 0.7, 20, 3, api_name="/write")
    assert "The seed is no number of up to 6 digits" in str(status)
    assert "Place: of 100,000 characters the first 160 were read" in str(status)
    assert "W" * 160 in str(current) and "W" * 161 not in str(current)
    printed = log.read_text()
    assert "rooms: 3, tokens: 60" in printed
    assert "xyzzy" not in printed and "WWWW" not in printed and "onerror" not in printed


CONTRAST = """selector => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selector)].filter(e => e.offsetParent).map(e => {
    let under = e;
    const alpha = of => numbers(getComputedStyle(of).backgroundColor)[3] ?? 1;
    while (under && alpha(under) < 1) under = under.parentElement;
    const [a, b] = [numbers(getComputedStyle(e).color), numbers(getComputedStyle(under).backgroundColor)]
      .map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""
READ = (
    *("h1", "h2", ".masthead p", "#status p", ".boxed", ".room footer span", ".room .copy", ".number", "dt"),
    *("dd", "#order [data-testid=block-info]", "#order input", "#write", "#dice", "#again", "#colophon p"),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_is_legible_and_asks_nobody_else(see, address, viewport, scheme):
    """Nothing sticks out, contrast is at least WCAG's 4.5, controls have names, no request goes out."""

    def look(browser):
        page = visit(browser, address, viewport=viewport, color_scheme=scheme)
        fill(page, place="cistern", mood="uneasy", features="bell", inhabitants="rats")
        set_number(page, "Length", 20)
        press_write(page)
        written(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        for selector in READ:
            contrasts = page.evaluate(CONTRAST, selector)
            assert contrasts and min(contrasts) >= 4.5, (selector, contrasts)
        paper = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(",")[:3])) > 384) == (scheme == "light"), paper
        controls = page.locator("input:visible, button:visible, textarea:visible")
        nameless = controls.evaluate_all("""all => all.filter(e => !(e.labels?.length || e.innerText?.trim()
            || e.getAttribute('aria-label') || e.title)).map(e => e.outerHTML)""")
        assert nameless == []
        assert "Room 1 is written" in page.inner_text("#status [role=status]:not(.sr-only)")
        widths = page.eval_on_selector_all("#order, #current .room", "all => all.map(e => e.offsetWidth)")
        assert len(widths) == 4 and min(widths) >= (340 if viewport == PHONE else 230), widths
        small = page.eval_on_selector_all(
            "#write, #dice, #again, .copy", "all => all.map(e => e.offsetHeight)"
        )
        assert len(small) == 6 and min(small) >= 32, small
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement !== document.body")
        assert page.said == [] and page.outside == []

    see(look)


def test_the_page_keeps_the_last_rooms_and_no_more(see, address):
    def look(browser):
        page = visit(browser, address)
        set_number(page, "Length", 20)
        set_number(page, "Variants", 1)
        for number in range(1, KEPT_ENTRIES + 3):
            press_write(page)
            written(page, f"Room {number} is written")
        numbers = page.eval_on_selector_all(".number", "all => all.map(e => Number(e.innerText))")
        assert numbers == list(range(KEPT_ENTRIES + 2, 2, -1)) and len(texts(page)) == 1

    see(look)


def test_the_queue_is_bounded_and_who_comes_too_late_is_told(see, address, gate):
    def join(session):
        values = [""] * 7 + ["1", 0.7, 20, 1, None]
        body = {"data": values, "fn_index": write_index, "session_hash": session, "trigger_id": None}
        request = urllib.request.Request(
            f"{address}/gradio_api/queue/join",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=PATIENCE_SECONDS).status

    with urllib.request.urlopen(f"{address}/config", timeout=PATIENCE_SECONDS) as response:
        functions = json.load(response)["dependencies"]
    (write_index,) = [number for number, one in enumerate(functions) if one["api_name"] == "write"]

    def look(browser):
        page = visit(browser, address)
        press_write(page)
        page.wait_for_function("document.body.innerText.includes('busy. Please try again')")

    with gate.closed():
        for number in range(AT_ONCE):
            assert join(f"writing{number}") == 200
        wait_until(lambda: gate.waiting == AT_ONCE)
        for number in range(MAX_WAITING):
            assert join(f"waiting{number}") == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            join("late")
        assert refused.value.code == 503 and "full" in refused.value.read().decode().lower()
        see(look)
    wait_until(lambda: gate.waiting == 0)
