"use strict";
// One state, shown by chips, tables and every chart; the address keeps it (`#methods=…&ranks=…`).
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const KINDS = ["methods", "ranks", "tasks"];
  const COLUMN = { methods: "method", ranks: "rank", tasks: "task" };
  const SHOWN = 200; // rows of the list of runs at a time
  const all = report.filters;
  const state = { rates: "best" };
  const views = new Map();

  const chosen = (kind) => all[kind].filter((item) => state[kind].has(item));
  const complete = (kind) => state[kind].size === all[kind].length;
  const initially = (kind) => chosen(kind).join("\n") === report.initial[kind].join("\n");

  // Tables are stored by column, repeated texts once. Each chart gets new rows, which Vega changes.
  function column(values) {
    return Array.isArray(values) ? values : values.codes.map((code) => values.texts[code] ?? null);
  }

  function rows(name) {
    const columns = Object.entries(report.tables[name] ?? {})
      .map(([key, values]) => [key, column(values)]);
    const count = columns.length ? columns[0][1].length : 0;
    return Array.from({ length: count }, (_, index) =>
      Object.fromEntries(columns.map(([key, values]) => [key, values[index]])));
  }

  function namesOfTables(part, found = new Set()) {
    if (Array.isArray(part)) part.forEach((inner) => namesOfTables(inner, found));
    else if (part && typeof part === "object") {
      if (part.data?.name) found.add(part.data.name);
      Object.values(part).forEach((inner) => namesOfTables(inner, found));
    }
    return found;
  }

  function readAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const kind of KINDS) {
      const names = (wanted.get(kind) ?? "").split(",");
      const known = all[kind].filter((item) => names.includes(String(item)));
      state[kind] = new Set(known.length ? known : report.initial[kind]);
    }
    state.rates = wanted.get("rates") === "all" ? "all" : "best";
  }

  function writeAddress() {
    const parts = KINDS
      .filter((kind) => !initially(kind))
      .map((kind) => `${kind}=${chosen(kind).map(encodeURIComponent).join(",")}`);
    if (state.rates === "all") parts.push("rates=all");
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

  const itemOf = (chip) =>
    all[chip.dataset.kind].find((item) => Number(chip.dataset.value) === item
      || chip.dataset.value === item);
  const chips = () => document.querySelectorAll(".chip[data-kind]");

  function show() {
    for (const chip of chips()) {
      const on = state[chip.dataset.kind].has(itemOf(chip));
      chip.setAttribute("aria-pressed", String(on));
    }
    for (const row of document.querySelectorAll(".results tbody tr")) {
      const { method, rank, task } = row.dataset;
      row.hidden = !(state.methods.has(method) && state.ranks.has(Number(rank))
        && state.tasks.has(task));
    }
    document.getElementById("rates")?.setAttribute("aria-pressed", String(state.rates === "all"));
    document.getElementById("reset").disabled = KINDS.every(initially) && state.rates === "best";
    listRuns();
    views.forEach(update);
  }

  function update(view) {
    for (const kind of KINDS) view.signal(kind, chosen(kind));
    view.signal("rates", state.rates);
    if (view.hasLegend) {
      const fields = [{ type: "E", field: "method" }];
      const tuples = complete("methods") ? [] : chosen("methods").map(
        (method) => ({ unit: view.legendUnit, fields, values: [method] }));
      view.data("legend_store", tuples);
    }
    return view.runAsync();
  }

  // A legend's selection changes the state, unless it equals it already.
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

  // As many columns as fit, a symbol and the longest name in each.
  function legendColumns(place) {
    const longest = Math.max(...all.methods.map((name) => name.length));
    return Math.max(2, Math.min(6, Math.floor((place.clientWidth - 70) / (34 + 6.5 * longest))));
  }

  // Vega-Lite warns about "fit-y" if a chart's height follows its rows, although only the width is
  // fitted. All other warnings are shown.
  const warn = console.warn.bind(console);
  console.warn = (...parts) => { if (!/fit-y/.test(parts.join(" "))) warn(...parts); };

  async function draw(place) {
    const name = place.dataset.chart;
    const specification = report.specifications[name];
    try {
      specification.datasets ??= {};
      for (const table of namesOfTables(specification)) {
        if (table in report.tables) specification.datasets[table] = rows(table);
      }
      for (const parameter of specification.params) {
        if (parameter.name === "legend_columns") parameter.value = legendColumns(place);
        if (parameter.name === "slant" && place.clientWidth < 400) parameter.value = -75;
      }
      const { view } = await vegaEmbed(place, specification, {
        mode: "vega-lite", renderer: report.renderer, actions: false,
        tooltip: { theme: "light" },
      });
      follow(view);
      views.set(name, view);
      await update(view);
    } catch (error) {
      place.innerHTML = '<p class="chart-error"></p>';
      place.firstChild.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(name, error);
    }
  }

  function sortBy(table, index, header) {
    const descending = turn(header);
    const key = (row) => row.cells[index].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // unknown values last in both orders
      const order = Number.isNaN(Number(x)) || Number.isNaN(Number(y))
        ? x.localeCompare(y) : Number(x) - Number(y);
      return descending ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  // Mark the heading of the sorted column; return whether the order is descending.
  function turn(header) {
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    return descending;
  }

  // The list of runs: the first ones that match the filters.
  const runs = rows("runs").map((run, index) => ({
    ...run, folder: report.folders?.names[index],
    address: report.folders && `${report.folders.starts[report.folders.start[index]]}/`
      + `${encodeURIComponent(report.folders.names[index])}/`,
  }));
  const order = { column: null, descending: false };
  const format = {
    learning_rate: (x) => x.toExponential(1), score: (x) => x.toFixed(2),
    curve: (x) => x.toFixed(2), output_gap: (x) => (x === 0 ? "0" : x.toExponential(1)),
    init_seconds: (x) => Number(x.toPrecision(3)), train_seconds: (x) => Math.round(x),
  };

  function listRuns() {
    const wanted = document.getElementById("find").value.trim().toLowerCase();
    const matching = runs.filter((run) =>
      KINDS.every((kind) => state[kind].has(run[COLUMN[kind]]))
      && (state.rates === "all" || run.best)
      && (!wanted || `${run.folder} ${run.arm} ${run.run_id}`.toLowerCase().includes(wanted)));
    if (order.column) {
      const [column, sign] = [order.column, order.descending ? -1 : 1];
      matching.sort((a, b) => {
        const [x, y] = [a[column], b[column]];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
      });
    }
    const shown = matching.slice(0, SHOWN);
    const limited = matching.length > SHOWN ? `, the first ${SHOWN} are listed` : "";
    document.getElementById("run-count").textContent = matching.length === runs.length && !limited
      ? "" : `${matching.length} of ${runs.length} runs match the filters${limited}.`;
    const columns = [...document.querySelectorAll("#runs thead th")]
      .map((header) => header.dataset.column);
    document.querySelector("#runs tbody").replaceChildren(...shown.map((run) => {
      const line = document.createElement("tr");
      columns.forEach((column, index) => {
        const cell = line.appendChild(document.createElement(index < 2 ? "th" : "td"));
        const value = run[column];
        const text = value === null || value === undefined ? "—"
          : String(format[column]?.(value) ?? value);
        if (column === "run_id" && run.address) {
          const link = cell.appendChild(document.createElement("a"));
          [link.href, link.textContent, link.title] = [run.address, text, run.folder];
        } else if (column === "method") {
          cell.appendChild(document.createElement("i"))
            .style.setProperty("--mark", report.colors[value]);
          cell.append(run.arm);
        } else cell.textContent = text;
      });
      return line;
    }));
  }

  for (const chip of chips()) {
    const item = itemOf(chip);
    chip.addEventListener("click",
      (event) => event.detail < 2 && toggle(chip.dataset.kind, item));
    chip.addEventListener("dblclick", () => choose(chip.dataset.kind, [item]));
  }
  document.getElementById("rates")?.addEventListener("click", () => {
    state.rates = state.rates === "all" ? "best" : "all";
    show();
    writeAddress();
  });
  document.getElementById("reset").addEventListener("click", () => {
    for (const kind of KINDS) state[kind] = new Set(report.initial[kind]);
    state.rates = "best";
    show();
    writeAddress();
  });
  document.getElementById("find").addEventListener("input", listRuns);
  for (const header of document.querySelectorAll("#runs thead th")) {
    header.querySelector("button").addEventListener("click", () => {
      order.descending = turn(header);
      order.column = header.dataset.column;
      listRuns();
    });
  }
  for (const list of document.querySelectorAll("select[data-parameter]")) {
    list.addEventListener("change", () => views.get(list.dataset.for)
      ?.signal(list.dataset.parameter, list.value).runAsync());
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((header, index) =>
      header.querySelector("button").addEventListener("click", () => sortBy(table, index, header)));
  }
  window.addEventListener("hashchange", () => { readAddress(); show(); });

  async function drawAll() {
    // One after the other, so that the page reacts while later charts are drawn.
    for (const place of document.querySelectorAll(".chart")) {
      await draw(place);
      await new Promise((done) => setTimeout(done));
    }
    document.documentElement.dataset.ready = String(views.size);
  }

  readAddress();
  show();
  drawAll();
})();
