// The heat map: one cell a head, coloured by normalized score or by the lead over its best heuristic.

const VIRIDIS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const DIVERGING = [[166, 62, 5], [232, 151, 90], [245, 245, 243], [98, 163, 208], [6, 86, 150]];
const STEPS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

// A colour between the stops of a ramp, at 0..1, and black or white, whichever reads on it.
function shade(ramp, place) {
  const at = clamp(place, 0, 1) * (ramp.length - 1), start = Math.min(Math.floor(at), ramp.length - 2);
  const rgb = ramp[start].map((low, i) => Math.round(low + (ramp[start + 1][i] - low) * (at - start)));
  const [r, g, b] = rgb.map((c) => (c / 255) ** 2.2);
  return { fill: `rgb(${rgb.join(" ")})`, ink: 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff" };
}

function heat(root, data, state) {
  const agents = data.agents.filter((agent) => Object.keys(agent.normalized_score).length);
  const map = one(".map", root), tip = one(".tip", root), agentBox = one(".agent", root), shownBox = one(".shown", root);
  const distinct = (axis) => [...new Set(data.heads.map((head) => head[axis]))].sort((a, b) => a - b);
  const layers = distinct(0), heads = distinct(1), rivals = agents.filter((agent) => agent.kind === "heuristic");
  const chart = svg(map, "svg", { role: "grid" });
  let focused = 0;  // index of the cell that the Tab key reaches

  options(agentBox, agents.map((agent, i) => [i, agent.name]), 0);
  shownBox.closest("label").hidden = !rivals.length;

  // What is shown of a head, and the words that say it.
  function measure(agent, index, difference) {
    const normalized_score = (one) => one.normalized_score[state.view]?.[index];
    const known = rivals.filter((rival) => rival !== agent && present(normalized_score(rival)));
    const best = known.sort((a, b) => normalized_score(b) - normalized_score(a))[0], own = normalized_score(agent);
    const lead = best && present(own) ? own - normalized_score(best) : null;
    const [layer, head] = data.heads[index], words = [`layer ${layer}, head ${head}`, `${agent.name} ${fixed(own)}`];
    if (best) words.push(`best heuristic ${best.name} ${fixed(normalized_score(best))}`);
    if (lead !== null) words.push(`difference ${signed(lead)}`);
    return { index, layer, head, words, value: difference ? lead : own };
  }

  function redraw() {
    const width = map.clientWidth - 66, agent = agents[agentBox.value], difference = shownBox.value === "difference";
    if (width <= 0) return;
    const cells = data.heads.map((_, index) => measure(agent, index, difference));
    const values = cells.map((cell) => cell.value).filter(present), reach = Math.max(1e-6, ...values.map(Math.abs));
    const [low, high] = difference ? [-reach, reach] : [Math.min(...values), Math.max(...values)];
    const upright = width / layers.length < 19;  // too narrow: layers go down, heads across
    const [across, down] = upright ? [heads, layers] : [layers, heads];
    const w = clamp(width / across.length, 14, upright ? 64 : 46), h = upright ? 20 : clamp(w, 22, 34);
    canvas(chart, 60 + w * across.length, 25 + h * down.length);
    set(chart, { "aria-label": `${difference ? "Difference to the best heuristic" : "Normalized score"} of ${agent.name} by layer and head` });
    svg(chart, "text", { x: 50, y: 14, "text-anchor": "end" }, upright ? "head" : "layer");
    across.forEach((name, i) => {
      if (i % Math.ceil(24 / w) === 0) svg(chart, "text", { x: 56 + w * (i + 0.5), y: 14, "text-anchor": "middle" }, name);
    });
    const ring = svg(null, "rect", { class: "ring", width: w, height: h, rx: 2 });
    down.forEach((name, i) => {
      const y = 22 + h * i, row = svg(chart, "g", { role: "row" });
      svg(row, "text", { x: 50, y: y + h / 2 + 4, "text-anchor": "end" }, `${upright ? "layer" : "head"} ${name}`);
      for (const cell of cells.filter((one) => (upright ? one.layer : one.head) === name)) {
        const x = 56 + w * across.indexOf(upright ? cell.head : cell.layer);
        draw(row, cell, { x, y, width: w, height: h }, ring, present(cell.value) ? (high > low ? (cell.value - low) / (high - low) : 1) : null, difference);
      }
    });
    chart.append(ring);
    legend(low, high, difference, values.length);
  }

  function draw(row, { index, value, words }, box, ring, place, difference) {
    const colour = shade(difference ? DIVERGING : VIRIDIS, place ?? 0), number = difference ? signed(value, 2) : fixed(value, 2);
    const rect = svg(row, "rect", { ...box, role: "gridcell", tabindex: index === focused ? 0 : -1, "aria-label": words.join(", "), "data-index": index });
    set(rect, place === null ? { class: "cell none" } : { class: "cell", fill: colour.fill });
    const text = place === null ? "" : box.width >= 34 ? number.replace("0.", ".") : difference && value < 0 ? "−" : "";
    const middle = { x: box.x + box.width / 2, y: box.y + box.height / 2 + 4, "text-anchor": "middle" };
    if (text) svg(row, "text", { ...middle, class: "value", "aria-hidden": "true" }, text).style.fill = colour.ink;
    rect.addEventListener("focus", () => set(ring, { x: box.x, y: box.y }));
    for (const event of ["pointerenter", "focus"]) rect.addEventListener(event, () => tell(rect, words));
    for (const event of ["pointerleave", "blur"]) rect.addEventListener(event, () => { tip.hidden = true; });
  }

  function legend(low, high, difference, count) {
    const scale = one(".scale", root), name = difference ? signed : fixed, ramp = difference ? DIVERGING : VIRIDIS;
    scale.replaceChildren(count ? name(low) : "no figures");
    if (!count) return;
    const bar = svg(scale, "svg", { width: 140, height: 12, "aria-hidden": "true" });
    for (let i = 0; i < 28; i++) svg(bar, "rect", { x: 5 * i, width: 5.5, height: 12, fill: shade(ramp, i / 27).fill });
    scale.append(name(high), difference ? " · − marks a head behind its best heuristic" : "");
  }

  function tell(cell, words) {
    tip.textContent = words.join("\n");
    tip.hidden = false;
    const place = cell.getBoundingClientRect(), frame = root.getBoundingClientRect();
    const left = place.left - frame.left + (place.width - tip.offsetWidth) / 2;
    tip.style.left = `${clamp(left, 0, Math.max(0, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${place.bottom - frame.top + 8}px`;
  }

  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip.hidden = true;
    const from = event.target.closest(".cell"), [dx, dy] = STEPS[event.key] ?? [];
    if (!from || dx === undefined) return;
    event.preventDefault();
    const at = (cell) => [Number(cell.getAttribute("x")), Number(cell.getAttribute("y"))], [x, y] = at(from);
    const ahead = (cell) => (at(cell)[0] - x) * dx + (at(cell)[1] - y) * dy;  // along the step
    const aside = (cell) => (at(cell)[0] - x) * dy + (at(cell)[1] - y) * dx;
    const next = all(".cell", chart).filter((cell) => aside(cell) === 0 && ahead(cell) > 0).sort((a, b) => ahead(a) - ahead(b))[0];
    if (!next) return;
    focused = Number(set(next, { tabindex: 0 }).dataset.index);
    set(from, { tabindex: -1 });
    next.focus();
  });
  for (const box of [agentBox, shownBox]) box.addEventListener("change", redraw);
  onWidth(map, redraw);
  return redraw;
}
