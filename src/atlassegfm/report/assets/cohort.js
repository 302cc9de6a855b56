"use strict";
(() => {
  const data = JSON.parse(document.getElementById("table-data").textContent);
  // Columns of the page's data to rows.
  const rowsOf = (table) => (table.state || table.case || []).map((_, index) =>
    Object.fromEntries(Object.entries(table).map(([key, values]) => [key, values[index]])));
  const cases = rowsOf(data.cases);
  const tables = { cases, structures: rowsOf(data.structures) };
  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const PAGE = 100; // rows in the page at a time: a table of thousands stays quick
  const VERDICTS = ["failed", "review", "good", "accepted"];

  const element = (name, content, kind) => {
    const made = document.createElement(name);
    if (content !== undefined && content !== null) made.textContent = content;
    if (kind) made.className = kind;
    return made;
  };
  const cell = (content, kind) => element("td", content, kind);
  const number = (value, digits) => cell(value === null ? "-" : value.toFixed(digits), value === null ? "n none" : "n");
  const badge = (verdict) => {
    const made = cell();
    made.append(verdict ? element("span", verdict, "badge " + verdict) : element("span", "-", "none"));
    return made;
  };
  const link = (row, address) => {
    const made = element("th");
    made.scope = "row";
    if (address) { const a = element("a", row.name); a.href = address; made.append(a); } else made.textContent = row.name;
    if (!row.inRun) { const tag = element("span", "earlier", "tag"); tag.title = "result of an earlier command"; made.append(" ", tag); }
    return made;
  };
  const volume = (value, cut) => {
    const made = cell(value >= 99.5 ? Math.round(value).toLocaleString("en") : value.toPrecision(3), "n");
    if (cut) made.append(element("small", `in view; ${cut}`, "cut"));
    return made;
  };
  const rank = (verdict) => (verdict ? VERDICTS.indexOf(verdict) : 9);

  // Head, class, value to sort by, cell; the first order is ascending.
  const columns = {
    cases: [
      ["case", "", (row) => row.name, (row) => link(row, row.link)],
      ["verdict", "", (row) => rank(row.verdict), (row) => badge(row.verdict)],
      ...(cases.some((row) => row.accepted) ? [["accepted", "n", (row) => row.accepted, (row) => cell(row.accepted, "n")]] : []),
      ["good", "n", (row) => row.good, (row) => cell(row.good, "n")],
      ["review", "n", (row) => row.review, (row) => cell(row.review, "n")],
      ["failed", "n", (row) => row.failed, (row) => cell(row.failed, "n")],
      ["present", "n", (row) => row.present - row.structures,
        (row) => cell(row.structures ? `${row.present} of ${row.structures}` : "-", "n")],
      ...(data.agreed ? [["lowest agreement", "n", (row) => row.agreement, (row) => number(row.agreement, 2)]] : []),
      ["registration confidence", "n", (row) => row.confidence, (row) => number(row.confidence, 2)],
      ["seconds", "n", (row) => row.seconds, (row) => number(row.seconds, 1)],
      ["unusual volumes", "n", (row) => row.outliers, (row) => cell(row.outliers || "", "n")],
      ["result", "why", (row) => (row.state === "done" ? 1 : 0), (row) => {
        const made = cell(row.state === "done" ? "done" : null, "why");
        if (row.state !== "done") made.append(element("span", row.state, "badge failed"), " " + row.reason);
        return made;
      }],
    ],
    structures: [
      ["case", "", (row) => cases[row.case].name, (row) => {
        const one = cases[row.case];
        return link(one, one.link && `${one.link}#s${row.value}`);
      }],
      ["structure", "", (row) => data.names[row.value], (row) => {
        const made = cell();
        const square = element("i", null, "swatch");
        square.style.background = `rgb(${data.colors[row.value].join(",")})`;
        made.append(square, data.names[row.value]);
        return made;
      }],
      ["verdict", "", (row) => rank(row.verdict), (row) => badge(row.verdict)],
      ["est. Dice", "n", (row) => row.estimate, (row) => number(row.estimate, 2)],
      ["status", "", (row) => row.status, (row) => cell(row.status)],
      ["volume ml", "n", (row) => row.volume, (row) => volume(row.volume, row.cut)],
      ["× median", "n", (row) => row.factor, (row) => {
        const made = number(row.factor, 2);
        if (row.outlier) { made.textContent = ""; made.append(element("span", row.factor.toFixed(2), "badge failed")); }
        return made;
      }],
      ...(data.agreed ? [
        ["atlas · model", "n", (row) => row.atlasModel, (row) => number(row.atlasModel, 2)],
        ["result · atlas", "n", (row) => row.resultAtlas, (row) => number(row.resultAtlas, 2)],
      ] : []),
      ["remarks", "why", (row) => row.remarks, (row) => cell(row.remarks, "why")],
    ],
  };

  const state = { tab: "cases", column: 0, descending: false, from: 0 };
  const search = one("#search"), structure = one("#structure"), verdict = one("#verdict");
  const byCase = new Map();
  cases.forEach((row) => byCase.set(row, []));
  tables.structures.forEach((row) => byCase.get(cases[row.case]).push(row));

  function matches(row) {
    const words = search.value.trim().toLowerCase();
    const wanted = structure.value, judged = verdict.value;
    const fits = (one) => (!wanted || String(one.value) === wanted) && (!judged || one.verdict === judged);
    const text = (one) => `${data.names[one.value]} ${one.status} ${one.remarks}`.toLowerCase();
    if (state.tab === "structures") {
      return fits(row) && (!words || cases[row.case].name.toLowerCase().includes(words) || text(row).includes(words));
    }
    const own = byCase.get(row);
    if (wanted || judged) { if (!own.some(fits)) return false; }
    return !words || `${row.name} ${row.reason}`.toLowerCase().includes(words) || own.some((one) => fits(one) && text(one).includes(words));
  }

  function compare(first, second) {
    // What is not known comes last, in either order.
    if (first === null || second === null) return first === second ? 0 : first === null ? 1 : -1;
    const order = typeof first === "string" ? first.localeCompare(second, "en", { numeric: true }) : first - second;
    return state.descending ? -order : order;
  }

  function draw() {
    const shown = columns[state.tab];
    const head = element("tr");
    shown.forEach(([name, kind], index) => {
      const th = element("th", null, kind);
      const button = element("button", name);
      button.type = "button";
      button.addEventListener("click", () => {
        state.descending = state.column === index ? !state.descending : false;
        state.column = index;
        state.from = 0;
        draw();
        one("#table thead").querySelectorAll("button")[index].focus();
      });
      if (index === state.column) th.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      th.scope = "col";
      th.append(button);
      head.append(th);
    });
    one("#table thead").replaceChildren(head);
    const key = shown[state.column][2];
    const rows = tables[state.tab].filter(matches).sort((a, b) => compare(key(a), key(b)));
    state.from = Math.min(state.from, Math.max(0, Math.floor((rows.length - 1) / PAGE) * PAGE));
    one("#table tbody").replaceChildren(...rows.slice(state.from, state.from + PAGE).map((row) => {
      const made = element("tr");
      made.append(...shown.map(([, , , build]) => build(row)));
      return made;
    }));
    one("#count").textContent = `${rows.length} of ${tables[state.tab].length} ${state.tab}`;
    const pager = one("#pager");
    pager.replaceChildren();
    if (rows.length > PAGE) {
      const step = (label, from, off) => {
        const button = element("button", label);
        button.disabled = off;
        button.addEventListener("click", () => { state.from = from; draw(); });
        return button;
      };
      const last = Math.min(state.from + PAGE, rows.length);
      pager.append(step("‹", state.from - PAGE, state.from === 0), element("span", `${state.from + 1} to ${last}`),
        step("›", state.from + PAGE, last >= rows.length));
    }
  }

  for (const control of [search, structure, verdict]) {
    control.addEventListener("input", () => { state.from = 0; draw(); });
  }
  for (const tab of all("[data-tab]")) {
    tab.addEventListener("click", () => {
      Object.assign(state, { tab: tab.dataset.tab, column: 0, descending: false, from: 0 });
      for (const other of all("[data-tab]")) other.setAttribute("aria-selected", String(other === tab));
      draw();
    });
  }
  draw();
})();
