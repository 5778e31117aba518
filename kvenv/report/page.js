// Tabs, the switch between views, tables that sort, and the start of it all.

// Buttons in the headings of a table: the first press sorts figures down and names up.
function sortable(table) {
  const body = one("tbody", table), headings = all("thead th", table);
  headings.forEach((heading, column) => {
    const button = html(null, "button", { type: "button" }, ...heading.childNodes);
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const up = before ? before === "descending" : column === 0;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const figure = (row) => row.cells[column]?.dataset.number;
      const compare = (a, b) => {
        if (column === 0) return a.cells[0].textContent.localeCompare(b.cells[0].textContent, "en", { numeric: true });
        return figure(a) - figure(b);
      };
      const rows = [...body.rows];
      const fixedRows = rows.filter((row) => row.classList.contains("full"));  // the full cache stays on top
      const known = rows.filter((row) => !fixedRows.includes(row) && (column === 0 || figure(row) !== undefined));
      const rest = rows.filter((row) => !fixedRows.includes(row) && !known.includes(row));
      body.append(...fixedRows, ...known.sort((a, b) => (up ? compare(a, b) : compare(b, a))), ...rest);
    });
  });
}

// One result at a time, chosen by tabs.
function tabbed() {
  const tabs = all("[role=tab]");
  const panel = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
  const select = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      panel(tab).hidden = tab !== chosen;
    }
  };
  tabs.forEach((tab, i) => {
    panel(tab).setAttribute("role", "tabpanel");
    panel(tab).setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const target = tabs.at(next % tabs.length);
      select(target);
      target.focus();
    });
  });
  if (tabs.length) select(tabs[0]);
}

function start() {
  document.documentElement.classList.add("js");
  const results = JSON.parse(document.getElementById("data").textContent);
  tabbed();
  for (const section of all(".result")) {
    const data = results[section.id], switches = all(".views input", section);
    const state = { view: switches[0]?.value ?? one("[data-view]", section)?.dataset.view ?? "full" };
    const redraws = [];
    section.dataset.shown = state.view;
    for (const [selector, widget] of [[".curves", curves], [".heat", heat], [".tokens", tokens]]) {
      const root = one(selector, section);
      if (root) redraws.push(widget(root, data, state));
    }
    for (const input of switches) {
      input.addEventListener("change", () => {
        section.dataset.shown = state.view = input.value;
        for (const redraw of redraws) redraw?.();
      });
    }
    if (innerWidth < 960) one(".record", section).open = false;
  }
  all("table[data-sortable]").forEach(sortable);
  addEventListener("beforeprint", () => all(".record").forEach((record) => { record.open = true; }));
}

start();
