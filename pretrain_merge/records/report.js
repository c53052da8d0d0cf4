
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 800px)");
  const chosen = { metric: data.metric, axis: "step" };
  const EARLY = 0.15; // of the run: what lies before may leave the picture, or the early fall would flatten the rest
  const MARKED = 60, DENSE = 300; // points: until then they can be told apart; beyond, wide lines would run together

  // a chart would take a name for markup of its own
  const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const faded = (color, alpha) => {
    const part = (at) => parseInt(color.slice(at, at + 2), 16);
    return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${alpha})`;
  };
  const theme = () => dark.matches
    ? { text: "#e6edf3", grid: "#30363d", page: "#0d1117", raw: "#9198a1", forecasts: ["#c297ff", "#ff9bce", "#b1bac4"],
        views: ["#58a6ff", "#ff9e64", "#3fd09b", "#f0a8d0", "#ffc658", "#a5d8ff"] }
    : { text: "#24292f", grid: "#e6e8eb", page: "#ffffff", raw: "#8a8f98", forecasts: ["#7b3294", "#b2182b", "#4d4d4d"],
        views: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"] };
  const dashes = ["solid", "dash", "dashdot", "longdash", "longdashdot"];

  const choice = (name, options) => {
    if (options.length < 2) return;
    const label = document.createElement("label"), select = document.createElement("select");
    label.textContent = `${name} `;
    for (const option of options) {
      const item = document.createElement("option");
      item.value = item.textContent = option;
      select.append(item);
    }
    select.addEventListener("change", () => { chosen[name] = select.value; draw(); });
    label.append(select);
    document.getElementById("controls").append(label);
  };

  const curves = (run, number, colors, several) => {
    const x = chosen.axis === "tokens" ? run.tokens : run.steps;
    const values = run.metrics[chosen.metric];
    if (!values) return [];
    const named = (name) => literal(several ? `${run.name}: ${name}` : name);
    const own = colors.views[number % colors.views.length];
    const mode = several || x.length > MARKED ? "lines" : "lines+markers"; // of several, the dashes are enough
    const line = (y, name, group, style, axis, more) => ({
      x, y, name: named(name), legendgroup: `${number} ${group}`, mode, type: "scatter", yaxis: axis, line: style,
      marker: { size: 4 }, connectgaps: false, hovertemplate: "%{y:.5g}", ...more,
    });
    const width = x.length > DENSE ? 1 : 2;
    const raw = { color: several ? own : colors.raw, width: several ? 1 : width, dash: several ? "dot" : "solid" };
    const traces = [line(values.raw, "raw", "raw", raw, "y")];
    Object.entries(values.views).forEach(([view, y], place) => {
      const color = several ? own : colors.views[place % colors.views.length];
      // where the colours begin anew, the dashes tell views apart
      const dash = dashes[(several ? place : Math.floor(place / colors.views.length)) % dashes.length];
      const style = { color, width, dash };
      const percent = y.map((value, at) => {
        const raw = values.raw[at];
        return value === null || !raw ? null : 100 * (value - raw) / Math.abs(raw);
      });
      // of several runs, one view each at first: a click on a name shows another
      const visible = several && place > 0 ? "legendonly" : true;
      traces.push(line(y, view, view, style, "y", { visible }));
      traces.push(line(percent, view, view, style, "y2", { visible, showlegend: false, hovertemplate: "%{y:+.2f}%" }));
    });
    Object.entries(values.forecasts).forEach(([name, band], place) => {
      const color = several ? own : colors.forecasts[place % colors.forecasts.length];
      const group = `forecast ${name}`, ends = chosen.axis === "tokens" ? band.tokens : band.steps;
      const visible = several && place > 0 ? "legendonly" : true;
      const edge = { visible, x: ends, mode: "lines", showlegend: false, hoverinfo: "skip", hovertemplate: null };
      traces.push(line(band.low, name, group, { width: 0 }, "y", edge));
      traces.push(line(band.high, name, group, { width: 0 }, "y", { ...edge, fill: "tonexty", fillcolor: faded(color, 0.2) }));
      traces.push(line(band.mean, `forecast ${name}`, group, { color, width: 2, dash: "dot" }, "y", { visible, x: ends }));
    });
    const aside = { color: several ? own : colors.raw, width: 1.5 };
    traces.push(line(run.spread, "spread", "raw", aside, "y3", { showlegend: false }));
    traces.push(line(run.window, "window", "raw", { ...aside, shape: "hv" }, "y4", { showlegend: false }));
    return traces;
  };

  const range = (traces, axis) => {
    const shown = traces.filter((trace) => trace.yaxis === axis);
    const steps = shown.flatMap((trace) => trace.x).filter((value) => value !== null);
    let first = Infinity, last = -Infinity, low = Infinity, high = -Infinity;
    for (const value of steps) { first = Math.min(first, value); last = Math.max(last, value); }
    for (const trace of shown) {
      trace.y.forEach((value, at) => {
        if (value !== null && trace.x[at] >= first + EARLY * (last - first)) {
          low = Math.min(low, value); high = Math.max(high, value);
        }
      });
    }
    if (axis === "y2" || axis === "y3") { low = Math.min(low, 0); high = Math.max(high, 0); }
    if (!(low <= high)) return undefined;
    const margin = 0.07 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  };

  const draw = () => {
    const colors = theme(), several = data.runs.length > 1;
    const traces = data.runs.flatMap((run, number) => curves(run, number, colors, several));
    const y = (domain, axis) => ({
      domain, gridcolor: colors.grid, zerolinecolor: axis === "y2" ? colors.raw : colors.grid, automargin: true,
      nticks: axis === "y" ? 12 : 4, rangemode: axis === "y4" ? "tozero" : "normal",
      range: axis === "y4" ? undefined : range(traces, axis),
    });
    // above its panel: turned by a right angle, a long name is longer than a panel is high
    const title = (text, top) => ({
      text: literal(text), xref: "paper", yref: "paper", x: 0, y: top, xanchor: "left", yanchor: "bottom", showarrow: false,
    });
    const ends = traces.flatMap((trace) => trace.x).filter((value) => value !== null);
    const first = ends.reduce((least, value) => Math.min(least, value), Infinity);
    const last = ends.reduce((most, value) => Math.max(most, value), first + 1);
    const beside = 0.02 * (last - first);
    const layout = {
      paper_bgcolor: colors.page, plot_bgcolor: colors.page, font: { color: colors.text, family: "system-ui, sans-serif" },
      hovermode: "x unified", hoverlabel: { bgcolor: colors.page }, margin: { t: 40, r: 8, b: 48, l: 48 },
      // at the bottom of all: however many lines it has, it stays clear of the axis
      legend: narrow.matches ? { orientation: "h", yref: "container", y: 0, yanchor: "bottom" } : { x: 1.01, y: 1 },
      xaxis: {
        title: { text: narrow.matches ? "" : chosen.axis }, anchor: "y4", gridcolor: colors.grid, zeroline: false,
        hoverformat: ",d", range: [first - beside, last + beside],
      },
      yaxis: y([0.52, 1], "y"), yaxis2: y([0.3, 0.46], "y2"), yaxis3: y([0.155, 0.24], "y3"), yaxis4: y([0, 0.095], "y4"),
      annotations: [
        title(narrow.matches ? `${chosen.metric} by ${chosen.axis}` : chosen.metric, 1),
        title("merged − raw (%)", 0.46), title("spread", 0.24), title("window", 0.095),
      ],
    };
    Plotly.react("curves", traces, layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "autoScale2d", "resetScale2d"]],
    });
  };

  choice("metric", data.metrics);
  choice("axis", data.runs.every((run) => run.tokens) ? ["step", "tokens"] : ["step"]);
  draw();
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
})();
