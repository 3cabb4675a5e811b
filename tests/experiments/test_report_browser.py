"""The page in a real browser: charts, filters, sorting and layout, without console messages."""

import html
import json
import re
import shutil
import subprocess

import pytest
from products import chosen
from synthetic_sweeps import SYNTHETIC, write_grid, write_protocol, write_sweep

from experiments.report import output
from experiments.report.output import write_report
from experiments.report.sweeps import load_sweeps

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to open the page"),
]


def written(*sweeps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_pictures", lambda *given: [])
        return write_report(
            load_sweeps(sweeps), sweeps[0] / "report", lambda step: None,
            alone=sweeps[0] / "handed_on.html",
        )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One learning rate, two seeds."""
    return written(write_sweep(tmp_path_factory.mktemp("outputs")))


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """Every chart that one task can have: two ranks, a control, everything measured."""
    root = tmp_path_factory.mktemp("outputs")
    return written(
        write_protocol(root, ranks=(8, 32), rates=[1e-4, 1e-3, 1e-2], seeds=(0, 1, 2), blocks=2,
                       control=("kaiming", "rslora"))
    )  # fmt: skip


def browse(address, profile):
    """The page's elements after its scripts have run; fails on any message on the console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
               "--no-first-run", "--disable-background-networking", "--disable-component-update",
               "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
               "--window-size=1300,900", "--hide-scrollbars",
               "--virtual-time-budget=9000", "--dump-dom", address]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def with_visitor(report, script):
    """The address of a copy of the page where `script` follows the page's own."""
    page = report.page.read_text(encoding="utf-8")
    before, end, after = page.rpartition("</body>")  # the libraries contain another
    visited = report.page.with_name("visited.html")
    visited.write_text(before + script + end + after, encoding="utf-8")
    return visited.as_uri()


def drawn_charts(elements):
    charts = elements.split("<main>")[1].split('id="run-list"')[0]
    assert "chart-error" not in charts
    return [part.split("</svg>")[0] for part in charts.split("<svg")[1:]]


@pytest.mark.exhaustive
def test_a_filter_in_the_address_reaches_every_chart(report, tmp_path):
    elements = browse(f"{report.page.as_uri()}#methods=kaiming,eva", tmp_path)
    assert 'data-ready="8"' in elements
    drawn = drawn_charts(elements)
    assert len(drawn) == 8
    compared = [chart for chart in drawn if 'aria-label="method:' in chart or "method: " in chart]
    assert len(compared) == 7, "all but the power of the sweep"
    for chart in compared:
        marks = set(re.findall(r'aria-label="[^"]*method: (\w+)[^"]*"', chart))
        assert "eva" in marks
        assert marks <= {"kaiming", "eva"}
    assert re.search(r'<tr data-method="pissa"[^>]* hidden', elements)


# Waits for the charts, clicks like a visitor, and notes what is then chosen.
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
  document.querySelector('[data-value="pissa"].chip').click(); await note();
  document.getElementById("reset").click(); await note();
  legend("eva"); await note();
  legend("pissa"); await note();
  document.querySelector('[data-value="eva"].chip').click(); await note();
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


@pytest.mark.exhaustive
def test_a_page_that_is_handed_on_links_to_nothing(report, tmp_path):
    page = report.page.parent.with_name("handed_on.html")
    elements = browse(page.as_uri(), tmp_path)
    assert len(drawn_charts(elements)) == report.page.read_text("utf-8").count('data-chart="') == 8
    shown = elements.split("<main>")[1].split("<script")[0]
    assert "<a " not in shown
    assert shown.count("<tr") > 4


def test_chips_legend_headings_and_hovering(report, tmp_path):
    elements = browse(with_visitor(report, VISITOR), tmp_path)
    seen = re.search(r'data-seen="([^"]*)"', elements).group(1).replace("&amp;", "&").splitlines()
    every = " ".join(SYNTHETIC)
    without = every.replace("pissa ", "")
    names = ",".join(name for name in SYNTHETIC if name != "pissa")
    assert seen[:-2] == [
        f"{without} | 0 1 | #methods={names}",  # a chip hides
        f"{every} | 1 1 | ",  # show all
        "eva | 0 1 | #methods=eva",  # the legend keeps one,
        "pissa eva | 1 1 | #methods=pissa,eva",  # adds another,
        "pissa | 1 0 | #methods=pissa",  # knows what a chip has hidden,
        "pissa eva | 1 1 | #methods=pissa,eva",
        "eva | 0 1 | #methods=eva",  # removes one,
        f"{every} | 1 1 | ",  # and after the last one shows all
    ]
    by_score = sorted(report.rows, key=lambda row: row.score.estimate)
    assert seen[-2] == ",".join(row.method for row in by_score)
    told = rf"method(?:{'|'.join(SYNTHETIC)})step\d+training loss, mean over seeds0\.\d+"
    assert re.match(told, seen[-1])


# Finds elements that overflow or overlap, and counts what is drawn.
SURVEYOR = """<script>
const inside = (box, outer) => box.left >= outer.left - 1 && box.right <= outer.right + 1
  && box.top >= outer.top - 1 && box.bottom <= outer.bottom + 1;
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
const shown = (element) => {
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && Number(element.getAttribute("opacity") ?? 1) > 0;
};
function survey() {
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page is too wide");
  const cards = [...document.querySelectorAll(".card")];
  cards.forEach((card, index) => cards.slice(index + 1).forEach((other) => {
    if (meet(card.getBoundingClientRect(), other.getBoundingClientRect()))
      found.push(`${card.id} lies on ${other.id}`);
  }));
  for (const place of document.querySelectorAll(".chart")) {
    const name = place.dataset.chart;
    const picture = place.querySelector("svg");
    if (!inside(picture.getBoundingClientRect(), place.getBoundingClientRect()))
      found.push(`${name} sticks out of its card`);
    const all = [...picture.querySelectorAll("text")]
      .filter((text) => text.textContent && shown(text));
    // Slanted labels have boxes that overlap although they do not.
    const texts = all.filter(
      (text) => !/rotate[(](?!-90[)])[^0)]/.test(text.getAttribute("transform")));
    for (const text of all)
      if (!inside(text.getBoundingClientRect(), picture.getBoundingClientRect()))
        found.push(`${name}: "${text.textContent}" is cut off`);
    const labels = texts.filter((text) => text.closest(".role-axis-label, .role-legend-label"));
    labels.forEach((label, index) => labels.slice(index + 1).forEach((other) => {
      if (meet(label.getBoundingClientRect(), other.getBoundingClientRect()))
        found.push(`${name}: "${label.textContent}" lies on "${other.textContent}"`);
    }));
  }
  return found;
}
const rest = () => new Promise((resolve) => setTimeout(resolve, 300));
const count = (marks) => document.querySelectorAll(marks).length;
const lines = () => count("#runs tbody tr");
const cells = () => [...document.querySelectorAll("#layers .mark-rect path")]
  .map((path) => path.getAttribute("fill")).join();
setTimeout(async () => {
  const seen = { width: innerWidth, charts: document.documentElement.dataset.ready };
  seen.found = survey();
  seen.best = [lines(), count("#score .mark-symbol path[aria-label*='run:']")];
  document.getElementById("rates").click(); await rest();
  seen.all = [lines(), document.getElementById("run-count").textContent];
  const find = document.getElementById("find");
  find.value = "EVA-rotten_tomatoes-r8"; find.dispatchEvent(new Event("input"));
  seen.matching = lines();
  find.value = ""; find.dispatchEvent(new Event("input"));
  document.querySelector('[data-kind="ranks"][data-value="32.0"]').click(); await rest();
  seen.ranks = [lines(), location.hash];
  const before = cells();
  const list = document.querySelector("#layers select");
  list.value = "update_size"; list.dispatchEvent(new Event("change")); await rest();
  seen.changed = cells() !== before && cells() !== "";
  document.getElementById("reset").click(); await rest();
  document.querySelector('#runs th[data-column="learning_rate"] button').click();
  document.querySelector('#runs th[data-column="learning_rate"] button').click();
  seen.first = document.querySelector("#runs tbody tr td:nth-child(5)").textContent;
  seen.links = [...document.querySelectorAll("#runs a")].map((link) => link.getAttribute("href"));
  parent.postMessage(JSON.stringify(seen), "*");
}, 4500);
</script>"""


@pytest.mark.parametrize("width", chosen([1280, 390], 1280))
def test_nothing_overlaps_or_overflows_and_every_filter_works(protocol, tmp_path, width):
    with_visitor(protocol, SURVEYOR)
    # A window of Chromium has at least 500 pixels; a frame may be narrower.
    outer = protocol.page.with_name("outer.html")
    outer.write_text(
        "<body><script>onmessage = (told) => { document.body.dataset.seen = told.data; };</script>"
        f'<iframe src="visited.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    elements = browse(outer.as_uri(), tmp_path)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', elements).group(1)))
    assert seen["width"] == width
    assert seen["found"] == []
    assert seen["charts"] == "14"
    methods, rates, seeds, controls = len(SYNTHETIC), 3, 3, 2
    assert seen["best"] == [methods * seeds + controls] * 2
    one_rank = methods * rates * seeds + controls
    assert seen["all"][0] == one_rank
    assert seen["all"][1].startswith(f"{one_rank} of {2 * methods * rates * seeds + controls} runs")
    assert seen["matching"] == (rates - 1) * seeds  # the best one’s have given way to the tested
    assert seen["ranks"] == [2 * one_rank - controls, "#ranks=8,32&rates=all"]
    assert seen["changed"]
    assert seen["first"] == "1.0e-2"
    for link in seen["links"]:
        assert (protocol.page.parent / link / "result.json").exists()


def test_two_tasks_are_shown_one_at_a_time(tmp_path):
    sweep = write_grid(tmp_path, methods=("kaiming", "pissa"), rates=[1e-4, 1e-3], seeds=(0, 1),
                       tasks=("r8", "rotten_tomatoes"), blocks=1, steps=20)  # fmt: skip
    elements = browse(written(sweep).page.as_uri(), tmp_path / "profile")
    drawn = dict(re.findall(r'<figure class="card[^"]*" id="(\w+)">(.*?)</figure>', elements, re.S))
    assert 'data-ready="13"' in elements
    assert len(re.findall(r'aria-label="[^"]*seeds: 0,1"', drawn["score"])) == 4  # dots and bars
    assert re.search(r'<tr data-method="pissa"[^>]*rotten_tomatoes"[^>]* hidden', elements)
    found = elements.split('id="matrix"')[1].split("</table>")[0]
    tasks = re.findall(r'<th class="plain">(\w+)</th>', found)
    assert tasks == ["r8", "r8", "rotten_tomatoes", "rotten_tomatoes"]
