"use strict";
// One state, shown by chips, tables and every chart; `#methods=…&seeds=…` in the address keeps it.
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const all = { methods: report.methods, seeds: report.seeds };
  const state = { methods: new Set(all.methods), seeds: new Set(all.seeds) };
  const views = [];

  const chosen = (kind) => all[kind].filter((item) => state[kind].has(item));
  const complete = (kind) => state[kind].size === all[kind].length;

  function readAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const kind of ["methods", "seeds"]) {
      const names = (wanted.get(kind) ?? "").split(",");
      const known = all[kind].filter((item) => names.includes(String(item)));
      state[kind] = new Set(known.length ? known : all[kind]);
    }
  }

  function writeAddress() {
    const parts = ["methods", "seeds"]
      .filter((kind) => !complete(kind))
      .map((kind) => `${kind}=${chosen(kind).map(encodeURIComponent).join(",")}`);
    history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : location.pathname);
  }

  function choose(kind, items) {
    state[kind] = new Set(items.length ? items : all[kind]); // none chosen means all
    show();
    writeAddress();
  }

  function toggle(kind, item) {
    const next = new Set(state[kind]);
    if (!next.delete(item)) next.add(item);
    choose(kind, [...next]);
  }

  function show() {
    for (const chip of document.querySelectorAll(".chip")) {
      const on = "method" in chip.dataset
        ? state.methods.has(chip.dataset.method) : state.seeds.has(Number(chip.dataset.seed));
      chip.setAttribute("aria-pressed", String(on));
    }
    for (const row of document.querySelectorAll("tbody tr")) {
      const seed = row.dataset.seed;
      row.hidden = !state.methods.has(row.dataset.method)
        || (seed !== undefined && !state.seeds.has(Number(seed)));
    }
    document.getElementById("reset").disabled = complete("methods") && complete("seeds");
    document.getElementById("subset-hint").hidden =
      report.subsets.includes(chosen("seeds").join(","));
    views.forEach(update);
  }

  function update(view) {
    view.signal("methods", chosen("methods")).signal("seeds", chosen("seeds"));
    if (view.hasLegend) {
      const fields = [{ type: "E", field: "method" }];
      const tuples = complete("methods") ? [] : chosen("methods").map(
        (method) => ({ unit: view.legendUnit, fields, values: [method] }));
      view.data("legend_store", tuples);
    }
    return view.runAsync();
  }

  // A legend's own selection arrives here; once it equals the state there is nothing left to do.
  function follow(view) {
    try { view.signal("legend"); } catch { return; }
    view.hasLegend = true;
    view.legendUnit = "";
    view.addSignalListener("legend", (_, selected) => {
      const names = all.methods.filter((name) => (selected?.method ?? []).includes(name));
      const wanted = names.length ? names : all.methods;
      if (wanted.join() !== chosen("methods").join()) choose("methods", wanted);
    });
  }

  async function draw(place) {
    const name = place.dataset.chart;
    try {
      const { view } = await vegaEmbed(place, report.specifications[name], {
        mode: "vega-lite", renderer: report.renderer, actions: false,
        tooltip: { theme: "light" },
      });
      follow(view);
      views.push(view);
      await update(view);
    } catch (error) {
      place.innerHTML = '<p class="chart-error"></p>';
      place.firstChild.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(name, error);
    }
  }

  function sortBy(table, index, header) {
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[index].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // unknown values last, either way
      const order = Number.isNaN(Number(x)) || Number.isNaN(Number(y))
        ? x.localeCompare(y) : Number(x) - Number(y);
      return descending ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  for (const chip of document.querySelectorAll(".chip")) {
    const kind = "method" in chip.dataset ? "methods" : "seeds";
    const item = kind === "methods" ? chip.dataset.method : Number(chip.dataset.seed);
    chip.addEventListener("click", (event) => event.detail < 2 && toggle(kind, item));
    chip.addEventListener("dblclick", () => choose(kind, [item]));
  }
  document.getElementById("reset").addEventListener("click", () => {
    state.seeds = new Set(all.seeds);
    choose("methods", all.methods);
  });
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((header, index) =>
      header.querySelector("button").addEventListener("click", () => sortBy(table, index, header)));
  }
  window.addEventListener("hashchange", () => { readAddress(); show(); });

  readAddress();
  show();
  Promise.all([...document.querySelectorAll(".chart")].map(draw))
    .then(() => { document.documentElement.dataset.ready = String(views.length); });
})();
