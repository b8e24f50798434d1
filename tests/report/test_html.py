"""The page opens in a real browser, shows its pictures and sorts its tables; and it asks for nothing outside itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hyperdflash.evaluation.report_job import make_report
from hyperdflash.report import figures
from hyperdflash.report.figures import save_figure
from hyperdflash.report.tables import write_page
from tests.report.fake_runs import fake_sweep, noisy

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
RATES = {"hyperdflash": 0.6, "pre_fc": 0.5, "dflash": 0.4}

# What a person does: sort the first table by its mean twice, then one whose rows belong together.
CLICKS = """<script>
const tables = [...document.querySelectorAll("table")], seen = {};
const column = (table, name) => [...table.tHead.rows[0].cells].findIndex(h => h.textContent === name);
const cells = (table, name) => [...table.tBodies[0].rows].map(row => row.cells[column(table, name)].textContent);
const click = (table, name) => table.tHead.rows[0].cells[column(table, name)].click();
window.addEventListener("load", () => {
  seen.first = cells(tables[0], "method");
  click(tables[0], "mean"); seen.down = cells(tables[0], "mean");
  click(tables[0], "mean"); seen.up = cells(tables[0], "mean");
  const positions = tables.find(table => column(table, "6") > 0);
  seen.before = cells(positions, "1"); click(positions, "1"); seen.after = cells(positions, "1");
  seen.pictures = [...document.images].map(image => image.naturalWidth);
  seen.ready = document.body.dataset.ready;
  document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
});
</script>"""


@pytest.fixture
def page(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    figure = Figure(figsize=(2, 1))
    monkeypatch.setattr(figures, "sweep_figures", lambda report, out: [save_figure(figure, out / "picture.png")])
    words = ["sweep=conditioning", "method=hyperdflash,pre_fc,dflash", "target=tiny,deep", "seed=0,1"]
    fake_sweep(words, lambda job: noisy(RATES[job.choices["method"]], int(job.choices["seed"])))
    make_report([*words, "num_resamples=50", f"html={tmp_path}/page.html"])
    return tmp_path / "page.html"


def test_the_page_is_complete_and_loads_nothing(page):
    text = page.read_text()
    outside = r"""href\s*=|src\s*=\s*"(?!data:)|url\(|@import|fetch\(|XMLHttpRequest|https?://"""
    assert not re.findall(outside, text) and text.count("<img") == 1
    assert text.count("<table>") == 2 * 3  # two targets
    assert '<td>hyperdflash</td>\n<td style="text-align:right">paper</td>' in text
    assert "dflash at the same kl" in text and "<h2>Runs</h2>" in text


def test_a_name_cannot_end_an_element(tmp_path):
    text = write_page("<x>", "# </h1><script>\n\n</p>\n", [], tmp_path / "page.html").read_text()
    assert "<title>&lt;x&gt;</title>" in text and "<h1>&lt;/h1&gt;&lt;script&gt;</h1>" in text and "<p>&lt;/p&gt;</p>" in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine: apt-get install chromium")
def test_a_browser_shows_pictures_and_sorts(page, tmp_path):
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text().replace("</body>", CLICKS + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*command, clicked.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["ready"] == "yes" and seen["pictures"] == [300]
    assert seen["first"] == ["hyperdflash", "hyperdflash", "pre_fc", "pre_fc", "dflash", "dflash"]
    taus = [float(text.split()[0]) for text in seen["down"]]
    assert taus == sorted(taus, reverse=True) and taus[0] > taus[-1]
    assert [float(text.split()[0]) for text in seen["up"]] == sorted(taus)
    assert seen["before"] == seen["after"]
