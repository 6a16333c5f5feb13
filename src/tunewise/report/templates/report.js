"use strict";
(function () {
  const NARROW = 560;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const config = { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false, typesetMath: false };

  function colours(value, style) {
    if (typeof value === "string") {
      const found = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return found ? style.getPropertyValue(found[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((each) => colours(each, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, colours(each, style)]));
    }
    return value;
  }

  function narrowed(layout, changes) {
    for (const [path, value] of Object.entries(changes)) {
      const parts = path.split(".");
      const last = parts.pop();
      let place = layout;
      for (const part of parts) place = place[part] = place[part] || {};
      place[last] = value;
    }
    return layout;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const element of document.querySelectorAll("[data-chart]")) {
      const chart = charts[element.dataset.chart];
      const figure = colours(chart.figure, style);
      const width = element.clientWidth;
      if (width < NARROW) narrowed(figure.layout, chart.narrow);
      figure.layout.width = width;
      Plotly.react(element, figure.data, figure.layout, config);
    }
  }

  async function copy(button) {
    const text = document.getElementById(button.dataset.copy).textContent;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }

  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));

  let waiting = 0;
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
