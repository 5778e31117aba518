// The token view: a text whose tokens are shaded by how long they survive.

// Little-endian 16-bit ranks, heads by tokens.
function decode(text, width) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const ranks = new Uint16Array(bytes.length / 2).map((_, i) => bytes[2 * i] | (bytes[2 * i + 1] << 8));
  return Array.from({ length: ranks.length / width }, (_, head) => ranks.subarray(head * width, (head + 1) * width));
}

function tokens(root, data) {
  const textBox = one(".text", root), headBox = one(".head", root), slider = one("input", root), reading = one(".reading", root);
  const steps = Array.from({ length: 25 }, (_, i) => 2 ** (i / 4 - 6));  // 1/64 to 1, four to a doubling
  slider.max = steps.length - 1;
  slider.value = 12;
  const heads = data.heads.map(([layer, head], i) => [i, `layer ${layer}, head ${head}`]);
  const together = heads.length > 1 ? [["all", `all ${heads.length} heads`]] : [];
  options(headBox, [...together, ...heads], together.length ? "all" : 0);
  const panes = all(".pane", root).map((pane) => ({ box: one("select", pane), words: one(".words", pane), spans: [], current: -1 }));
  const hint = reading.textContent;
  const text = () => data.texts[textBox.value];
  const budget = () => {  // as the evaluation rounds: halves to the even number
    const exact = steps[slider.value] * text().tokens.length, half = exact % 1 === 0.5;
    return clamp(half ? 2 * Math.round(exact / 2) : Math.round(exact), 1, text().tokens.length);
  };

  function fill() {
    const { agents, tokens: words, document: name } = text();
    reading.textContent = hint;
    const kinds = new Map(data.agents.map((agent) => [agent.name, agent.kind]));
    const heuristic = agents.findIndex((agent) => kinds.get(agent.name) === "heuristic");
    const rival = heuristic > 0 ? heuristic : Math.min(1, agents.length - 1);
    panes.forEach((pane, i) => {
      const kept = agents.findIndex((agent) => agent.name === pane.name);
      options(pane.box, agents.map((agent, at) => [at, agent.name]), kept >= 0 ? kept : i ? rival : 0);
      pane.spans = words.map((word, at) => html(null, "span", { "data-at": at, class: word.trim() ? "" : "blank" }, word.replace(/\r?\n/g, "↵\n")));
      pane.words.replaceChildren(...pane.spans);
      pane.words.setAttribute("aria-label", `Tokens of ${name}; arrow keys read one by one`);
      pane.current = -1;  // none is being read
    });
    choose();
  }

  // The ranks of the chosen agents are decoded when they are first needed.
  function choose() {
    for (const pane of panes) {
      const agent = text().agents[pane.box.value];
      pane.name = agent?.name;
      if (agent && !agent.rows) agent.rows = decode(agent.ranks, text().tokens.length);
      pane.rows = !agent ? [] : headBox.value === "all" ? agent.rows : [agent.rows[headBox.value]];
    }
    cut();
  }

  // Marks what goes at the slider's budget.
  function cut() {
    const limit = budget(), count = text().tokens.length, share = steps[slider.value];
    const words = `${budgetName(share)}, ${limit.toLocaleString("en")} of ${count.toLocaleString("en")} tokens`;
    one("output", root).textContent = words;
    slider.setAttribute("aria-valuetext", words);
    for (const pane of panes) {
      const single = pane.rows.length === 1;
      pane.spans.forEach((span, at) => {
        let kept = 0;
        for (const row of pane.rows) if (row[at] < limit) kept++;
        const part = pane.rows.length ? kept / pane.rows.length : 0;
        const strength = single ? 1 - Math.log2(pane.rows[0][at] + 1) / Math.max(1, Math.log2(count)) : part;
        span.style.setProperty("--s", clamp(strength, 0, 1).toFixed(3));
        span.classList.toggle("gone", part < 0.5);
        span.classList.toggle("lost", kept === 0);
        span.title = describe(pane, at, kept);
      });
      if (pane.current >= 0) read(pane, pane.current);
    }
  }

  function describe(pane, at, kept) {
    const count = text().tokens.length, word = JSON.stringify(text().tokens[at]);
    if (pane.rows.length !== 1) return `token ${at + 1}, ${word}: kept by ${kept} of ${pane.rows.length} heads`;
    const rank = pane.rows[0][at] + 1;
    return `token ${at + 1}, ${word}: rank ${rank} of ${count}, stays down to ${(100 * rank / count).toPrecision(2)} % of the prompt`;
  }

  function read(pane, at) {
    pane.spans[pane.current]?.classList.remove("current");
    pane.current = clamp(at, 0, pane.spans.length - 1);
    const span = pane.spans[pane.current];
    span.classList.add("current");
    reading.textContent = `${pane.name}: ${span.title}`;
  }

  for (const pane of panes) {
    pane.box.addEventListener("change", choose);
    pane.words.addEventListener("click", (event) => {
      const span = event.target.closest("[data-at]");
      if (span) read(pane, Number(span.dataset.at));
    });
    pane.words.addEventListener("keydown", (event) => {
      const next = { ArrowRight: pane.current + 1, ArrowLeft: pane.current - 1, Home: 0, End: pane.spans.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      read(pane, next);
      pane.spans[pane.current].scrollIntoView({ block: "nearest" });
    });
    pane.words.addEventListener("scroll", () => {
      for (const other of panes) if (other !== pane) other.words.scrollTop = pane.words.scrollTop;
    });
  }
  textBox.addEventListener("change", fill);
  headBox.addEventListener("change", choose);
  slider.addEventListener("input", cut);
  fill();
}
