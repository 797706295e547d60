"use strict";
// Draws the charts of the report page with plotly.js, from the JSON in the element `data`. It draws a chart when it comes
// into view, and again when a control or the colour scheme changes. Texts of sites reach the page as text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // As many colours as a page has jobs at most (`MAX_JOBS`).
  const LIGHT = ["#2264c8", "#d1570f", "#1c8653", "#a0429c", "#a17400", "#0b879b", "#c42f4e", "#5b5fc7", "#6a7d12", "#87583a", "#5a6675", "#d6409f"];
  const DARK = ["#78acff", "#ff9d66", "#62d29b", "#e28fdb", "#e2bf55", "#58cbdc", "#ff7d95", "#a8abff", "#bccb62", "#d3a486", "#aab6c4", "#ff9fd2"];
  // In pixels, since the legend draws them too. plotly.js scales the patterns that have names.
  const DASHES = ["", "7px,4px", "2px,3px", "7px,3px,2px,3px", "13px,4px", "9px,3px,2px,3px,2px,3px"];
  const PRINTED = [340, 230]; // pixels, scaled to the sheet: report.css has the same aspect ratio
  const MAX_PRINTED = 120; // charts; more of them take a browser too long
  const state = { axis: "step", log: false, hidden: new Set(), jobs: new Set(), printing: false };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const several = data.jobs.length > 1;
  const drawn = new Map();

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => dark.matches && !state.printing;
  const nth = (place) => (isDark() ? DARK : LIGHT)[place % LIGHT.length];
  // With one job, a site has one colour on the whole page, and dashes tell the second dozen of sites from the first. With
  // several jobs, a job has one colour, and dashes tell its sites apart: dashes are harder to see on a noisy curve.
  const places = new Map(data.sites.map((site, place) => [site, place])); // without the federation
  const colour = ({ job, site }) => (several ? nth(job) : places.has(site) ? nth(places.get(site)) : css("--ink"));
  const dash = ({ site }) => DASHES[Math.floor((places.get(site) || 0) / (several ? 1 : LIGHT.length)) % DASHES.length];
  const looks = DASHES.length * (several ? 1 : LIGHT.length);
  // plotly.js reads some HTML in labels. With entities in place of these characters it shows any text as it is.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const label = (line) => (several ? `${data.jobs[line.job]} · ${line.site}` : line.site);
  const format = (value) => (value === null || value === undefined ? "" : typeof value === "string" ? value : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5))));

  function unit(charts) {
    const longest = Math.max(1, ...charts.lines.map((line) => line.t.reduce((a, b) => Math.max(a, b), 0)));
    return longest > 10800 ? [3600, "hours"] : longest > 180 ? [60, "minutes"] : [1, "seconds"];
  }

  // The federation run logs once a round, with the round as its step.
  const isByRound = (chart, line) => line.r.length > 0 && (state.axis === "round" || (state.axis === "step" && chart.of_federation));

  function axisTitle(chart, unitName) {
    if (state.axis === "time") return `${unitName} since the start`;
    const byRound = chart.lines.filter((line) => isByRound(chart, line)).length;
    const others = chart.lines.some((line) => line.x.some((x) => x !== null)) ? "step" : "log call";
    if (byRound === chart.lines.length) return "round";
    return byRound ? `round, or ${others} of lines without rounds` : others;
  }

  function points(chart, line, seconds) {
    if (isByRound(chart, line)) return [line.r, line.ry];
    if (state.axis === "time") return sorted(line.t.map((t) => t / seconds), line.y);
    const steps = line.x.map((x, i) => (x === null ? i : x));
    return sorted(steps, line.y);
  }

  function sorted(x, y) {
    if (x.every((value, i) => i === 0 || x[i - 1] <= value)) return [x, y];
    const order = x.map((_, i) => i).sort((a, b) => x[a] - x[b] || a - b);
    return [order.map((i) => x[i]), order.map((i) => y[i])];
  }

  const shown = (line) => !state.hidden.has(line.site) && !state.jobs.has(line.job);

  function lineTraces(chart) {
    const [seconds, name] = unit(chart);
    const traces = chart.lines.map((line) => {
      const [x, y] = points(chart, line, seconds);
      return {
        x, y, name: plain(label(line)), visible: shown(line), type: "scatter",
        mode: x.length < 2 ? "markers" : x.length <= 40 ? "lines+markers" : "lines", marker: { size: x.length < 2 ? 7 : 4 },
        line: { width: x.length > 600 ? 1.2 : 1.8, color: colour(line), dash: dash(line) || "solid" },
        hovertemplate: "%{y:.5g}",
      };
    });
    return [traces, axisTitle(chart, name)];
  }

  function bandTraces(chart) {
    const traces = [];
    for (const band of chart.bands) {
      if (state.jobs.has(band.job)) continue;
      const base = several ? nth(band.job) : css("--accent");
      const about = several ? plain(data.jobs[band.job]) + " " : "";
      const fill = several ? base + "26" : css("--band");
      const edge = { type: "scatter", mode: "lines", line: { width: 0, color: base }, hovertemplate: "%{y:.5g}" };
      traces.push({ ...edge, x: band.r, y: band.low, name: about + "lowest" });
      traces.push({ ...edge, x: band.r, y: band.high, name: about + "highest", fill: "tonexty", fillcolor: fill });
      traces.push({
        x: band.r, y: band.mean, name: about + "mean", type: "scatter", mode: band.r.length <= 40 ? "lines+markers" : "lines",
        line: { width: 2.4, color: base }, marker: { size: 5 }, hovertemplate: "%{y:.5g}",
      });
      if (band.weighted.length) {
        traces.push({ ...edge, x: band.r, y: band.weighted, name: about + "weighted mean", line: { width: 1.6, color: base, dash: "dash" } });
      }
    }
    return [traces, "round"];
  }

  function histogramTraces(chart) {
    const traces = chart.lines.map((line) => ({
      x: line.edges, y: [...line.counts, 0], name: plain(label(line)), visible: shown(line), type: "scatter", mode: "lines",
      line: { width: 1.6, color: colour(line), shape: "hv", dash: dash(line) || "solid" },
      fill: "tozeroy", fillcolor: colour(line) + "22", hovertemplate: "%{y:.5g}",
    }));
    return [traces, "value"];
  }

  const makers = { lines: lineTraces, band: bandTraces, histogram: histogramTraces };

  const isWhole = (title) => /^(round|step|log call)/.test(title);

  function draw(place) {
    const element = drawn.get(place), chart = data.charts[place];
    const [traces, title] = makers[chart.type](chart);
    const axis = {
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, tickfont: { color: css("--soft"), size: 11 },
      automargin: true, fixedrange: coarse, exponentformat: "power", nticks: 6,
    };
    const layout = {
      margin: { l: 8, r: 10, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
      hovermode: "x unified", dragmode: coarse ? false : "zoom",
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 }, namelength: 40 },
      xaxis: { ...axis, showgrid: false, title: { text: title, font: { size: 12, color: css("--soft") }, standoff: 6 }, hoverformat: isWhole(title) ? "d" : ".3~f" },
      yaxis: { ...axis, type: state.log && chart.type !== "histogram" ? "log" : "linear" },
      height: element.clientHeight || 230,
    };
    if (state.printing) [layout.width, layout.height] = PRINTED;
    const ends = traces.flatMap((trace) => (trace.x.length ? [trace.x[0], trace.x[trace.x.length - 1]] : []));
    // Ticks stand at whole rounds and steps only: there is no round 0.5.
    if (isWhole(title) && Math.max(...ends) - Math.min(...ends) <= 8) layout.xaxis.dtick = 1;
    Plotly.react(element, traces, layout, { displayModeBar: false, displaylogo: false, responsive: true });
    for (const svg of element.querySelectorAll(".main-svg")) {
      if (state.printing) svg.setAttribute("viewBox", `0 0 ${PRINTED[0]} ${PRINTED[1]}`);
      else svg.removeAttribute("viewBox");
    }
  }

  const redraw = () => { for (const place of drawn.keys()) draw(place); paint(); };

  // The legend: samples of the lines, drawn as plotly.js draws them.
  function paint() {
    for (const element of document.querySelectorAll(".sample")) {
      const line = { job: Number(element.dataset.job), site: element.dataset.site };
      element.style.stroke = several && element.dataset.job === undefined ? css("--soft") : colour(line);
      element.style.strokeDasharray = dash(line) || "none";
    }
  }

  function table(heads, rows) {
    const made = document.createElement("table");
    const head = made.createTHead().insertRow();
    for (const text of heads) {
      const cell = document.createElement("th");
      cell.scope = "col"; cell.className = "n"; cell.textContent = text;
      head.append(cell);
    }
    const body = made.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const value of row) { const cell = line.insertCell(); cell.className = "n"; cell.textContent = format(value); }
    }
    return made;
  }

  // What a chart shows, as a table: a row for each step, or each round, and a column for each line.
  function values(chart) {
    if (chart.type === "histogram") {
      const rows = chart.lines.flatMap((line) => line.counts.map((n, i) => [label(line), line.edges[i], line.edges[i + 1], n]));
      return table([several ? "job · site" : "site", "from", "to", "count"], rows.slice(0, 2000));
    }
    if (chart.type === "band") {
      const heads = chart.bands.flatMap((band) => ["mean", "lowest", "highest", ...(band.weighted.length ? ["weighted mean"] : []), ...(band.sites.length ? ["sites"] : [])].map((name) => (several ? `${data.jobs[band.job]} ${name}` : name)));
      const rounds = [...new Set(chart.bands.flatMap((band) => band.r))].sort((a, b) => a - b);
      return table(["round", ...heads], rounds.map((r) => [r, ...chart.bands.flatMap((band) => {
        const i = band.r.indexOf(r);
        return [band.mean[i], band.low[i], band.high[i], ...(band.weighted.length ? [band.weighted[i]] : []), ...(band.sites.length ? [band.sites[i]] : [])];
      })]));
    }
    const byRound = chart.lines.every((line) => line.r.length);
    const rows = new Map();
    chart.lines.forEach((line, column) => {
      const x = byRound ? line.r : line.x.map((step, i) => (step === null ? i : step)), y = byRound ? line.ry : line.y;
      x.forEach((at, i) => { if (!rows.has(at)) rows.set(at, new Array(chart.lines.length).fill(null)); rows.get(at)[column] = y[i]; });
    });
    let keys = [...rows.keys()].sort((a, b) => a - b);
    if (keys.length > 400) { const every = Math.ceil(keys.length / 400); keys = keys.filter((_, i) => i % every === 0 || i === keys.length - 1); }
    return table([byRound ? "round (last value)" : "step", ...chart.lines.map(label)], keys.map((key) => [key, ...rows.get(key)]));
  }

  for (const details of document.querySelectorAll("details[data-values]")) {
    details.addEventListener("toggle", () => {
      const box = details.querySelector(".scroll");
      if (details.open && !box.firstChild) box.append(values(data.charts[details.dataset.values]));
    });
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      drawn.set(Number(entry.target.dataset.chart), entry.target);
      draw(Number(entry.target.dataset.chart));
    }
  }, { rootMargin: "400px" });
  for (const element of document.querySelectorAll(".chart")) seen.observe(element);

  function find(text) {
    const wanted = text.trim().toLowerCase();
    let count = 0;
    for (const group of document.querySelectorAll(".group")) {
      let any = false;
      for (const card of group.querySelectorAll(".card")) {
        card.hidden = !card.dataset.key.toLowerCase().includes(wanted);
        if (!card.hidden) { any = true; count += 1; }
      }
      group.hidden = !any;
    }
    document.getElementById("found").textContent = wanted ? `${count} charts found` : "";
  }

  function say(id, text) {
    const element = document.getElementById(id);
    if (element) { element.textContent = text; element.hidden = !text; }
  }

  const controls = document.getElementById("controls");
  if (controls) {
    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.addEventListener("change", () => {
      state.axis = controls.elements.axis.value;
      state.log = controls.elements.log.checked;
      redraw();
    });
    controls.elements.find.addEventListener("input", (event) => find(event.target.value));
    controls.addEventListener("click", (event) => {
      const chip = event.target.closest(".chip");
      if (!chip) return;
      const on = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", String(on));
      const [set, value] = chip.dataset.toggle === "job" ? [state.jobs, Number(chip.dataset.job)] : [state.hidden, chip.dataset.site];
      if (on) set.delete(value); else set.add(value);
      redraw();
    });
  }
  dark.addEventListener("change", redraw);
  const code = several && data.sites.length > 1 ? "A line has the colour of its job and the dashes of its site. " : "";
  const alike = `${several ? "Dashes" : "Colours and dashes"} repeat after ${looks} sites: point at a line to read its site, or hide other sites above.`;
  say("code", code + (data.sites.length > looks ? alike : ""));
  let opened = [];
  addEventListener("beforeprint", () => {
    state.printing = true;
    document.documentElement.classList.add("printing"); // the styles for print do not hold yet, and css() reads them
    opened = [...document.querySelectorAll("details.more:not([open])")];
    for (const fold of opened) fold.open = true;
    const all = document.querySelectorAll(".chart");
    for (const element of all) if (drawn.size < MAX_PRINTED) drawn.set(Number(element.dataset.chart), element);
    say("printed", drawn.size < all.length ? `Print shows ${drawn.size} of ${all.length} charts; the page shows all.` : "");
    redraw();
  });
  addEventListener("afterprint", () => {
    state.printing = false;
    document.documentElement.classList.remove("printing");
    for (const fold of opened) fold.open = false;
    say("printed", "");
    redraw();
  });
  paint();
})();
