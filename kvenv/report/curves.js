// Retention over budgets: lines with bands, and a legend that gives the figures at one budget.

const DASHES = ["7 3", "2 3", "9 3 2 3", "4 2", "1 3", "12 4"];
const COLOURS = { learned: [0, 6], heuristic: [6, 8] };  // where in the style sheet, and how many
const MARKS = [  // corners, in units of the mark's size; the first is a circle
  null,
  [[-1, -1], [1, -1], [1, 1], [-1, 1]],
  [[0, -1.3], [1.2, 0.9], [-1.2, 0.9]],
  [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]],
  [[0, 1.3], [1.2, -0.9], [-1.2, -0.9]],
];

// How each agent's line looks: colour, dashes and mark, alike in plot and legend.
function styled(agents) {
  const seen = { learned: 0, heuristic: 0, oracle: 0 };
  return agents.map((agent) => {
    const { kind } = agent, at = seen[kind]++, [start, count] = COLOURS[kind] ?? [];
    const look = `curve ${kind} c-${COLOURS[kind] ? start + (at % count) : "ink"}`;
    const dash = { learned: "none", oracle: "1 4", heuristic: DASHES[at % DASHES.length] }[kind];
    return { ...agent, look, dash, corners: MARKS[at % MARKS.length], place: at };
  });
}

function mark(parent, corners, x, y, r = 4) {
  if (!corners) return svg(parent, "circle", { class: "mark", cx: x, cy: y, r });
  const points = corners.map(([dx, dy]) => `${x + dx * r},${y + dy * r}`).join(" ");
  return svg(parent, "polygon", { class: "mark", points });
}

function curves(root, data, state) {
  const { budgets } = data, agents = styled(data.agents.filter((agent) => Object.keys(agent.curve).length));
  const order = budgets.map((_, i) => i).sort((a, b) => budgets[a] - budgets[b]);
  const logs = budgets.map(Math.log2), lowest = Math.min(-1, ...logs);
  const nearest = (log) => order.reduce((best, i) => (Math.abs(logs[i] - log) < Math.abs(logs[best] - log) ? i : best));
  // Of many heuristics, the best few at first.
  const shown = new Set(agents.filter((agent) => agents.length < 10 || agent.kind !== "heuristic" || agent.place < 5));
  const plot = one(".plot", root), toggle = one("button", root), entries = one(".entries", root);
  const name = "Budget at which the legend's figures are given";
  const chart = svg(plot, "svg", { role: "slider", tabindex: 0, "aria-label": name, "aria-valuemin": 0, "aria-valuemax": order.length - 1 });
  let at = nearest(-3), unscale = null;
  root.classList.toggle("many", agents.length > 9);  // the legend goes below

  for (const agent of agents) {
    const sample = svg(null, "svg", { width: 34, height: 14, class: agent.look, "aria-hidden": "true" });
    svg(sample, "path", { d: "M1 7H33", "stroke-dasharray": agent.dash });
    mark(sample, agent.corners, 17, 7);
    agent.box = html(null, "input", { type: "checkbox" });
    [agent.value, agent.interval] = [html(null, "b"), html(null, "small")];
    html(entries, "label", {}, agent.box, sample, html(null, "span", {}, agent.name), agent.value, agent.interval);
    agent.box.addEventListener("change", () => {
      shown[agent.box.checked ? "add" : "delete"](agent);
      redraw();
    });
  }

  function redraw() {
    const width = plot.clientWidth, height = clamp(width * 0.56, 250, 430);
    if (!width) return;
    const left = 36, right = width - 12, top = 10, bottom = height - 42;
    const lines = agents.filter((agent) => shown.has(agent) && agent.curve[state.view]);
    const values = lines.flatMap(({ curve }) => [...curve[state.view].low, ...curve[state.view].mean]).filter(present);
    const floor = clamp(Math.floor(Math.min(1, ...values) * 10) / 10, 0, 0.9);
    const x = (log) => left + (1 - log / lowest) * (right - left);
    const y = (value) => bottom - ((value - floor) / (1 - floor)) * (bottom - top);
    unscale = (place) => (1 - (place - left) / (right - left)) * lowest;
    canvas(chart, width, height);
    for (let tick = floor; tick < 1.001; tick += floor < 0.5 ? 0.2 : 0.1) {
      svg(chart, "line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) });
      svg(chart, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(1));
    }
    for (let log = Math.ceil(lowest); log <= 0; log++) {
      svg(chart, "line", { class: "grid", x1: x(log), x2: x(log), y1: top, y2: bottom });
      svg(chart, "text", { x: x(log), y: bottom + 17, "text-anchor": log ? "middle" : "end" }, budgetName(2 ** log));
    }
    svg(chart, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    svg(chart, "text", { x: (left + right) / 2, y: height - 7, "text-anchor": "middle" }, "budget, as a share of the prompt");
    svg(chart, "line", { class: "cursor", x1: x(logs[at]), x2: x(logs[at]), y1: top, y2: bottom });
    for (const agent of lines.reverse()) line(agent, agent.curve[state.view], x, y);
    figures();
  }

  function line(agent, curve, x, y) {
    const known = order.filter((i) => present(curve.mean[i]) && present(curve.low[i]) && present(curve.high[i]));
    const path = (key, indices) => indices.map((i) => `${x(logs[i]).toFixed(1)} ${y(curve[key][i]).toFixed(1)}`).join("L");
    if (!known.length) return;
    const group = svg(chart, "g", { class: agent.look, "data-agent": agent.name });
    svg(group, "path", { class: "band", d: `M${path("high", known)}L${path("low", [...known].reverse())}Z` });
    svg(group, "path", { d: `M${path("mean", known)}`, "stroke-dasharray": agent.dash });
    for (const i of known) if (Number.isInteger(logs[i])) mark(group, agent.corners, x(logs[i]), y(curve.mean[i]));
  }

  function figures() {
    const budget = budgetName(budgets[at]);
    for (const agent of agents) {
      const curve = agent.curve[state.view], spread = curve && present(curve.low[at]) && curve.low[at] < curve.high[at];
      agent.box.checked = shown.has(agent);
      agent.value.textContent = fixed(curve?.mean[at]);
      agent.interval.textContent = spread ? `${fixed(curve.low[at])}–${fixed(curve.high[at])}` : "";
    }
    one("output", root).textContent = budget;
    toggle.textContent = shown.size === agents.length ? "Hide heuristics" : "Show all";
    const words = agents.filter((agent) => shown.has(agent)).map((agent) => `${agent.name} ${agent.value.textContent}`);
    set(chart, { "aria-valuenow": order.indexOf(at), "aria-valuetext": `${budget} of the prompt: ${words.join(", ")}` });
  }

  function move(index) {
    at = index;
    redraw();
  }
  const point = (event) => move(nearest(unscale(event.clientX - chart.getBoundingClientRect().left)));
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("keydown", (event) => {
    const now = order.indexOf(at), last = order.length - 1;
    const next = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    move(order[clamp(next, 0, last)]);
  });
  toggle.addEventListener("click", () => {
    const full = shown.size === agents.length;
    for (const agent of agents) shown[full && agent.kind === "heuristic" ? "delete" : "add"](agent);
    redraw();
  });
  onWidth(plot, redraw);
  return redraw;
}
