"""The page opens in a real browser, draws, sorts and filters; and it asks for nothing outside itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hyperdflash.evaluation import report_job as entry
from hyperdflash.evaluation.report_job import make_report
from tests.report.fake_runs import fake_sweep, noisy

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
RATES = {"pre_gate": 0.6, "pre_fc": 0.5, "layers_mean_fc": 0.4}

# What a person does: sort by tau twice, point at a dot, hide a line, switch acceptance, domain and target.
CLICKS = """<script>
const seen = {}, find = css => document.querySelector(css), all = css => [...document.querySelectorAll(css)];
const column = name => all("#table th").findIndex(h => h.textContent.startsWith(name));
const cells = name => all("#table tbody tr").map(r => r.children[column(name)].firstChild?.textContent);
const click = node => node.dispatchEvent(new MouseEvent("click", {bubbles: true}));
const choose = (id, value) => { find("#" + id).value = value; find("#" + id).dispatchEvent(new Event("change")); };
const lines = () => all("#acceptance g.series").length, points = () => find("#acceptance polyline").getAttribute("points");
seen.first = cells("variant");
click(all("#table th")[column("τ mean")]); seen.down = cells("τ mean");
click(all("#table th")[column("τ mean")]); seen.up = cells("τ mean");
seen.lines = lines();
find("#acceptance circle.hit").dispatchEvent(new MouseEvent("mouseenter", {clientX: 200, clientY: 200}));
seen.tip = find("#tip").textContent; seen.tipShown = getComputedStyle(find("#tip")).display;
click(find("#legend button")); seen.hidden = lines(); click(find("#legend button"));
const before = points();
choose("rate", "conditional"); seen.conditional = points() !== before;
choose("group", "code"); seen.axisLabel = find("#byaxis").textContent.includes("τ, code");
seen.panels = all("#byaxis svg").length;
seen.steps = all("#bystep g.series").length; seen.parallel = all("#parallel polyline").length;
choose("target", "deep"); seen.deep = cells("variant").length;
seen.ready = document.body.dataset.ready; seen.error = document.body.dataset.error || null;
document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
</script>"""


@pytest.fixture
def page(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    monkeypatch.setattr(entry, "sweep_figures", lambda report, out: [])
    words = ["sweep=conditioning", "variant=pre_gate,pre_fc,layers_mean_fc", "target=tiny,deep", "seed=0,1"]
    fake_sweep(words, lambda job: noisy(RATES[job.choices["variant"]], int(job.choices["seed"])))
    make_report([*words, "num_resamples=50", f"html={tmp_path}/page.html"])
    return tmp_path / "page.html"


def test_the_page_is_whole_and_asks_for_nothing(page):
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)""", text)
    assert "{{" not in text.replace("${{", "")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert len(data["cells"]) == 12 and data["baseline"] == "layers_mean_fc at the same kl"
    assert {"math", "code", "chat", "mean"} == set(data["cells"][0]["tau"])


def test_a_name_cannot_end_the_script_element(page, monkeypatch):
    from hyperdflash.report import html

    monkeypatch.setattr(html, "page_data", lambda report: {"name": "</script><b>"})
    html.write_page(type("Report", (), {"name": "<x>"}), page)
    assert (
        page.read_text().count("</script>") == html.TEMPLATE.read_text().count("</script>")
        and "<title>Sweep &lt;x&gt;" in page.read_text()
    )


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine: apt-get install chromium")
def test_a_browser_draws_sorts_and_filters(page, tmp_path):
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text().replace("</body>", CLICKS + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*command, clicked.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["ready"] == "yes" and seen["error"] is None
    assert seen["first"] == ["pre_gate", "pre_gate", "pre_fc", "pre_fc", "layers_mean_fc", "layers_mean_fc"]
    taus = [float(text) for text in seen["down"]]
    assert taus == sorted(taus, reverse=True) and [float(text) for text in seen["up"]] == sorted(taus) and taus[0] > taus[-1]
    assert (seen["lines"], seen["hidden"], seen["steps"], seen["parallel"], seen["deep"], seen["panels"]) == (6, 5, 6, 6, 6, 2)
    assert seen["tipShown"] == "block" and "position 1" in seen["tip"] and "%" in seen["tip"]
    assert seen["conditional"] and seen["axisLabel"]
