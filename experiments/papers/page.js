"use strict";
// Each chart is drawn when it comes near the window: the page opens at once however many there are.
const specifications = JSON.parse(document.getElementById("specifications").textContent);

function draw(place) {
  const options = { actions: false, renderer: "svg", ast: false };
  vegaEmbed(place, specifications[place.dataset.chart], options).catch((error) => {
    place.textContent = `This chart could not be drawn: ${error.message}`;
    place.classList.add("chart-error");
  });
}

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "600px" },
);
for (const place of document.querySelectorAll("[data-chart]")) seen.observe(place);
