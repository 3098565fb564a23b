"use strict";
// Draws the charts of the page, in the colours of its theme, and in a live page asks for what is new.
(function () {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const phone = matchMedia("(max-width: 46rem)");
  const PRINT_WIDTH = 660; // CSS pixels that fit on A4 and on letter paper
  let charts = JSON.parse(document.getElementById("charts").textContent);
  let printing = false;

  function layoutOf(chart) {
    const night = dark.matches && !printing;
    const ink = night ? "#e6e9ec" : "#1f2428";
    const rule = night ? "#343a40" : "#dde1e5";
    const axis = { gridcolor: rule, linecolor: rule, zerolinecolor: rule, automargin: true };
    const given = chart.layout;
    const layout = {
      height: 290, margin: { l: 8, r: 12, t: 12, b: 8 }, uirevision: "kept", hovermode: "closest",
      font: { color: ink, size: 12, family: "system-ui, sans-serif" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, traceorder: "normal" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: night ? "#a2abb3" : "#8a939b", activecolor: ink },
      dragmode: phone.matches ? false : "zoom",
      ...given,
      xaxis: { ...axis, ...given.xaxis }, yaxis: { ...axis, ...given.yaxis },
    };
    const named = chart.traces.filter((trace) => trace.showlegend !== false).length;
    if (phone.matches && named > 2) layout.height += 17 * named;
    layout.showlegend = named > 1;
    if (printing) { layout.width = PRINT_WIDTH; layout.height = Math.min(layout.height, 245); }
    else layout.autosize = true;
    return layout;
  }

  function configOf() {
    const buttons = phone.matches || printing ? false : "hover";
    return { displaylogo: false, responsive: true, displayModeBar: buttons, modeBarButtons: [["toImage", "resetScale2d"]] };
  }

  function draw() {
    for (const chart of charts) {
      const place = document.getElementById("chart-" + chart.key);
      if (place) Plotly.react(place, chart.traces, layoutOf(chart), configOf());
    }
  }

  function print(begins) {
    printing = begins;
    for (const folded of document.querySelectorAll("details")) {
      if (begins) { folded.dataset.was = folded.open ? "open" : ""; folded.open = true; }
      else { folded.open = folded.dataset.was === "open"; }
    }
    draw();
  }

  // New words and tables, with the charts that are there left in their places, so that they keep their zoom.
  function show(found) {
    const fresh = document.createElement("template");
    fresh.innerHTML = found.body;
    for (const place of fresh.content.querySelectorAll(".chart")) {
      const old = document.getElementById(place.id);
      if (!old) continue;
      old.setAttribute("aria-label", place.getAttribute("aria-label"));
      place.replaceWith(old);
    }
    const opened = new Set();
    for (const folded of document.querySelectorAll("details[open]")) opened.add(folded.querySelector("summary").textContent);
    for (const folded of fresh.content.querySelectorAll("details")) folded.open = opened.has(folded.querySelector("summary").textContent);
    document.getElementById("content").replaceChildren(fresh.content);
    charts = found.charts;
    draw();
  }

  draw();
  dark.addEventListener("change", draw);
  phone.addEventListener("change", draw);
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  if (document.documentElement.dataset.live !== "yes") return;
  const status = document.getElementById("status");
  let version = "";
  let failures = 0;
  status.hidden = false;
  status.textContent = "Live: this page updates itself while the run goes on.";

  async function ask() {
    const begin = performance.now();
    let answered = begin;
    try {
      const answer = await fetch("news?version=" + encodeURIComponent(version), { cache: "no-store" });
      failures = 0;
      const found = answer.status === 200 ? await answer.json() : null;
      answered = performance.now(); // what drawing takes is no burden of the run's
      if (found) {
        version = found.version;
        show(found);
      }
    } catch (error) {
      failures += 1;
    }
    if (failures >= 3) {
      status.textContent = "The run has ended, or its page is no longer served: this is the last state. lowtide report writes it to a file.";
      return;
    }
    // The slower the answer, the rarer the question.
    setTimeout(ask, Math.min(30000, Math.max(2000, 50 * (answered - begin))));
  }
  ask();
})();
