"use strict";
(async () => {
  const specifications = JSON.parse(document.getElementById("specifications").textContent);

  // Vega-Lite warns of "fit-y" wherever a chart's height follows its rows, though only the width is
  // fitted. Everything else that it says is shown.
  const warn = console.warn.bind(console);
  console.warn = (...told) => { if (!/fit-y/.test(told.join(" "))) warn(...told); };

  // One after another, so that those at the top are there first.
  for (const place of document.querySelectorAll("[data-chart]")) {
    try {
      await vegaEmbed(place, specifications[place.dataset.chart], {
        mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "light" },
      });
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
      place.classList.add("chart-error");
      console.error(place.dataset.chart, error);
    }
  }
  document.body.dataset.ready = "yes";
})();
