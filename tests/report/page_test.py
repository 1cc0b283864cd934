"""The page in a real browser: what is shown, what the filters leave, and that no text is markup."""

import base64
import json
import pathlib
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request

import pytest
import report_fixtures as made
from places import ROOT

from qlog.report import page, read, server

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")

# What a rollout may hold, all of it text.
HOSTILE = (
    "</script><script>document.title = 'taken'</script>"
    "<img src=x onerror=\"document.title='taken'\">"
    "<!-- <script> __DATA__ __TITLE__ & &lt; \u2028 \x00 </pre><b>bold</b>"
)


@pytest.fixture
def run(tmp_path):
    config = made.paper_config("finqa", "cold,garl,q=0.75")
    folder = tmp_path / "a <b>run</b>"
    made.finished(folder, config, 0.5, curve=[0.0, 0.1, 0.4])
    made.write_rollouts(
        folder,
        [
            (
                0,
                "first",
                "What is 1 + 1?",
                "2",
                [
                    {"log_w": -3.0, "rationale": HOSTILE, "coefficient": -0.25},
                    {"log_w": "-inf", "rationale": "none", "forced": True},
                    {"log_w": -0.5, "rationale": "plain", "answer": "it is 2", "reward": 1.0},
                ],
            ),
            (0, "second", "What is blue?", "sky", [{"rationale": "needle in here"}, {}]),
            (10, "first", "What is 1 + 1?", "2", [{}, {}, {}]),
        ],
    )
    return folder


def clicked(text, tmp_path, script):
    """What `script`, run in a browser after the page's own, returns."""
    file = tmp_path / "page.html"
    file.write_text(
        text.replace(
            "</body>",
            "<script>(() => { const set = (id, value) => { const node = by(id); "
            "if (node.type === 'checkbox') { if (node.checked !== value) node.click(); } "
            "else { node.value = value; "
            "node.dispatchEvent(new Event('input')); node.dispatchEvent(new Event('change')); } };"
            "const cards = () => [...document.querySelectorAll('.card')].map((card) => "
            "[card.closest('.group').dataset.step, card.closest('.group').dataset.id, "
            "card.dataset.rollout].join(' '));"
            f"const result = (() => {{ {script} }})();"
            "const node = document.createElement('pre'); node.id = 'result';"
            "node.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(result))));"
            "document.body.append(node); })();</script></body>",
        )
    )
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="result">([^<]*)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]).decode()), done.stdout


@needs_browser
def test_filters_and_sorting_leave_what_they_say(run, tmp_path):
    text = page.build(read.read([read.Path(run)]), "one run")
    result, _ = clicked(
        text,
        tmp_path,
        """
        const seen = {all: cards(), found: by("found").textContent};
        set("step", "1"); seen.step = cards();
        set("prompt", "first"); seen.prompt = cards();
        set("sort", "log_w"); seen.sorted = cards();
        set("descending", true); seen.descending = cards();
        set("forced", true); seen.forced = cards();
        set("forced", false); set("step", "all"); set("prompt", "all");
        set("text", "NEEDLE"); seen.text = cards();
        set("text", "nowhere"); seen.nothing = [cards(), by("found").textContent];
        set("text", "");
        seen.facts = [...document.querySelectorAll('.card dl')].map((each) => each.textContent);
        seen.health = by("health").textContent;
        seen.curves = document.querySelectorAll("#charts polyline").length;
        document.querySelector("#legend input").click();
        seen.hidden = document.querySelectorAll("#charts polyline").length;
        seen.config = document.querySelectorAll("#config tbody tr").length;
        set("all-fields", true);
        seen.wholeConfig = document.querySelectorAll("#config tbody tr").length;
        return seen;
        """,
    )
    first = [f"1 first {i}" for i in range(3)]
    assert sorted(result["all"]) == sorted(
        [*first, "1 second 0", "1 second 1", *(f"11 first {i}" for i in range(3))]
    )
    assert result["found"] == "8 rollouts of 3 prompts"
    assert sorted(result["step"]) == sorted([*first, "1 second 0", "1 second 1"])
    assert result["prompt"] == first
    assert result["sorted"] == ["1 first 1", "1 first 0", "1 first 2"]  # -inf is the lowest
    assert result["descending"] == ["1 first 2", "1 first 0", "1 first 1"]
    assert result["forced"] == ["1 first 1"]
    assert result["text"] == ["1 second 0"]
    assert result["nothing"] == [[], "0 rollouts of 0 prompts"]
    assert any("log w-3coefficient-0.25" in facts for facts in result["facts"])
    assert "no_signal" not in result["health"] and "log_p" in result["health"]
    assert result["curves"] >= 2 and result["hidden"] == 0
    assert result["wholeConfig"] > result["config"] > 5


@needs_browser
def test_no_text_of_a_run_is_read_as_markup(run, tmp_path):
    text = page.build(read.read([read.Path(run)]), "a <i>title</i> __DATA__")
    result, dom = clicked(
        text,
        tmp_path,
        """
        return {
          title: document.title,
          shown: [...document.querySelectorAll("pre.rationale")].map((each) => each.textContent),
          markup: document.querySelectorAll("main img, main b b, main i, main script").length,
          right: [...document.querySelectorAll(".card .good")].length,
          scripts: document.scripts.length,
          wrong: [...document.querySelectorAll(".level")].map((each) => each.textContent),
        };
        """,
    )
    assert result["title"] == "a <i>title</i> __DATA__"
    assert HOSTILE in result["shown"]
    assert result["markup"] == 0 and result["right"] == 1
    assert result["scripts"] == 3  # the data, the page's own, this test's


def test_nothing_is_fetched(run):
    text = page.build(read.read([read.Path(run)]), "page")
    head = text.partition('<script type="application/json"')[0]
    assert "default-src 'none'" in head
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(", head)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data and json.loads(data[1])["runs"][0]["state"] == "finished, step 500 of 500"


def test_a_page_stays_small_however_many_rollouts_there_are(run, monkeypatch):
    long = [{"rationale": "x" * 30_000}] * 4
    made.write_rollouts(run, [(step, "q", "p", "g", long) for step in range(50)])
    monkeypatch.setattr(page, "_BYTES", 1_000_000)
    content = page.data(read.read([read.Path(run)]), "page")
    steps = [group["step"] for group in content["rollouts"][0]]
    assert len(json.dumps(content)) < 1_500_000 and steps[-1] == 50
    assert content["cut"] == [f"{len(steps)} of the 50 steps in rollouts.jsonl are shown"]
    assert content["rollouts"][0][0]["rollouts"][0]["rationale"].endswith(
        "(cut: 30,000 characters)"
    )


def test_a_live_page_follows_the_run(run, monkeypatch):
    monkeypatch.setattr(server, "_FRESH", -1.0)
    with server.Server([str(run.parent)]) as live:
        threading.Thread(target=live.serve_forever, daemon=True).start()
        ask = lambda path: urllib.request.urlopen(live.url + path, timeout=20).read().decode()
        assert "one HTML" not in ask("") and '"live": true' in ask("")
        before = json.loads(ask("data.json"))
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "phase": "train", "log_p": -1.5}\n{"step": 4, "ph')
        after = json.loads(ask("data.json"))
        curve = lambda found: next(
            c["series"][0]["points"] for c in found["charts"] if c["title"] == "mean log P"
        )
        assert len(curve(after)) == len(curve(before)) + 1 and curve(after)[-1] == [4, -1.5]
        for path in ("owner.json", "../etc/passwd", "data.json?x"):
            with pytest.raises(urllib.error.HTTPError):
                ask(path)
        # A name that another site points at this machine.
        request = urllib.request.Request(live.url, headers={"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=20)
        live.shutdown()


def test_the_template_is_part_of_the_package():
    assert "**/*.html" in (ROOT / "setup.cfg").read_text()
    assert pathlib.Path(page.__file__).with_name("page.html").exists()


def test_lines_that_are_no_rollouts_are_left_out(run):
    """And rollouts of many runs are not all read."""
    with open(run / "rollouts.jsonl", "a") as file:
        file.write('null\n[1]\n{"step": "x"}\n{"step": 12}\n{"step": 13, "id": null')
    one = read.read([read.Path(run)])
    content = page.data(one, "page")
    assert content["rollouts"][0][-1]["step"] == 13 and len(content["rollouts"][0]) == 4
    many = page.data(one * 14, "page")
    assert many["rollouts"][12:] == [[], []] and "name fewer" in many["cut"][13]
    assert len(many["runs"]) == 14
