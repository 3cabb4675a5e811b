"""The page in a real browser: draws, filters, sorts, and says nothing on the console."""

import re
import shutil
import subprocess

import pytest
from synthetic_sweeps import SYNTHETIC, write_sweep

from experiments.report import writing
from experiments.report.sweeps import load_sweeps

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip


pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to open the page")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    sweep = write_sweep(tmp_path_factory.mktemp("outputs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "export", lambda chart, output: None)
        return writing.write_report(load_sweeps([sweep]), sweep / "report", lambda step: None)


def browse(address, profile):
    """The page's elements after its scripts have run; fails on any message on the console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
               "--no-first-run", "--disable-background-networking", "--disable-component-update",
               "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
               "--virtual-time-budget=6000", "--dump-dom", address]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def drawn_charts(elements):
    charts = elements.split("<main>")[1].split("<section")[0]
    assert "chart-error" not in charts
    return [part.split("</svg>")[0] for part in charts.split("<svg")[1:]]


def test_a_filter_in_the_address_reaches_every_chart(report, tmp_path):
    elements = browse(f"{report.page.as_uri()}#methods=kaiming,eva&seeds=1", tmp_path)
    assert 'data-ready="7"' in elements
    drawn = drawn_charts(elements)
    assert len(drawn) == 7
    for chart in drawn:
        marks = set(re.findall(r'aria-label="[^"]*method: (\w+)[^"]*"', chart))
        assert "eva" in marks
        assert marks <= {"kaiming", "eva"}
    assert re.search(r'<tr data-method="pissa"[^>]* hidden', elements)


# Waits for the charts, clicks what the page's visitor would, and notes what is then chosen.
VISITOR = """<script>
const pressed = () => [...document.querySelectorAll('.chip[aria-pressed="true"]')]
  .map((chip) => chip.textContent.trim()).join(" ");
const legend = (name) => [...document.querySelectorAll("#loss .role-legend-label text")]
  .find((label) => label.textContent === name)
  .dispatchEvent(new MouseEvent("click", { bubbles: true }));
const lines = (name) => document.querySelectorAll(
  `#cost .mark-symbol path[aria-label*="method: ${name};"]`).length;
const rest = () => new Promise((resolve) => setTimeout(resolve, 300));
setTimeout(async () => {
  const seen = [];
  const note = async () => {
    await rest();
    seen.push(`${pressed()} | ${lines("pissa")} ${lines("eva")} | ${location.hash}`);
  };
  document.querySelector('[data-method="pissa"].chip').click(); await note();
  document.getElementById("reset").click(); await note();
  legend("eva"); await note();
  legend("pissa"); await note();
  document.querySelector('[data-method="eva"].chip').click(); await note();
  legend("eva"); await note();
  legend("pissa"); await note();
  legend("eva"); await note();
  document.querySelector("#results thead th:nth-child(2) button").click();
  const order = [...document.querySelectorAll("#results tbody tr")].map((r) => r.dataset.method);
  seen.push(order.join());
  scrollTo(0, document.querySelector("#loss").offsetTop);
  const box = document.querySelector("#loss svg").getBoundingClientRect();
  const at = { bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + 120 };
  const under = document.elementFromPoint(at.clientX, at.clientY);
  under.dispatchEvent(new PointerEvent("pointerover", at));
  under.dispatchEvent(new PointerEvent("pointermove", at));
  await rest();
  seen.push(document.getElementById("vg-tooltip-element").textContent);
  document.body.dataset.seen = seen.join("\\n");
}, 2500);
</script>"""


def test_chips_legend_headings_and_hovering(report, tmp_path):
    html = report.page.read_text(encoding="utf-8")
    page = report.page.with_name("visited.html")
    before, end, after = html.rpartition("</body>")  # the libraries contain another
    page.write_text(before + VISITOR + end + after, encoding="utf-8")
    elements = browse(page.as_uri(), tmp_path)
    seen = re.search(r'data-seen="([^"]*)"', elements).group(1).replace("&amp;", "&").splitlines()
    every = " ".join(SYNTHETIC) + " seed 0 seed 1"
    without = every.replace("pissa ", "")
    names = ",".join(name for name in SYNTHETIC if name != "pissa")
    assert seen[:-2] == [
        f"{without} | 0 1 | #methods={names}",  # a chip hides
        f"{every} | 1 1 | ",  # show all
        "eva seed 0 seed 1 | 0 1 | #methods=eva",  # the legend keeps one,
        "pissa eva seed 0 seed 1 | 1 1 | #methods=pissa,eva",  # adds another,
        "pissa seed 0 seed 1 | 1 0 | #methods=pissa",  # knows what a chip has hidden,
        "pissa eva seed 0 seed 1 | 1 1 | #methods=pissa,eva",
        "eva seed 0 seed 1 | 0 1 | #methods=eva",  # removes one,
        f"{every} | 1 1 | ",  # and after the last one shows all
    ]
    by_score = sorted(report.rows, key=lambda row: row.score.estimate)
    assert seen[-2] == ",".join(row.method for row in by_score)
    assert re.match(rf"method(?:{'|'.join(SYNTHETIC)})step\d+loss, mean over seeds0\.\d+", seen[-1])
