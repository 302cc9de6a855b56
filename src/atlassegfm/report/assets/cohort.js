"use strict";
(() => {
  const data = JSON.parse(document.getElementById("table-data").textContent);
  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const PAGE = 100; // rows in the page at a time: a table of thousands stays quick
  const VERDICTS = ["failed", "review", "good"];

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
  const link = (name, address) => {
    const made = element("th");
    made.scope = "row";
    if (address) { const a = element("a", name); a.href = address; made.append(a); } else made.textContent = name;
    return made;
  };
  const volume = (value) => cell(value >= 99.5 ? Math.round(value).toLocaleString("en") : value.toPrecision(3), "n");
  const rank = (verdict) => (verdict ? VERDICTS.indexOf(verdict) : 9);

  // Head, class, value to sort by, cell; the first order is ascending.
  const columns = {
    cases: [
      ["case", "", (row) => row[0], (row) => link(row[0], row[1])],
      ...(data.judged ? [
        ["verdict", "", (row) => rank(row[2]), (row) => badge(row[2])],
        ["good", "n", (row) => row[3], (row) => cell(row[3], "n")],
        ["review", "n", (row) => row[4], (row) => cell(row[4], "n")],
        ["failed", "n", (row) => row[5], (row) => cell(row[5], "n")],
      ] : [["verdict", "", () => 9, () => badge(null)]]),
      ["present", "n", (row) => row[6] - row[7], (row) => cell(row[7] ? `${row[6]} of ${row[7]}` : "-", "n")],
      ...(data.went ? [["lowest round trip", "n", (row) => row[8], (row) => number(row[8], 2)]] : []),
      ...(data.agreed ? [["lowest agreement", "n", (row) => row[9], (row) => number(row[9], 2)]] : []),
      ["registration confidence", "n", (row) => row[10], (row) => number(row[10], 2)],
      ["seconds", "n", (row) => row[11], (row) => number(row[11], 1)],
      ["unusual volumes", "n", (row) => row[12], (row) => cell(row[12] || "", "n")],
      ["result", "why", (row) => (row[13] === "done" ? 1 : 0), (row) => {
        const made = cell(row[13] === "done" ? "done" : null, "why");
        if (row[13] !== "done") made.append(element("span", row[13], "badge failed"), " " + row[14]);
        return made;
      }],
    ],
    structures: [
      ["case", "", (row) => data.cases[row[0]][0], (row) => {
        const [name, address] = data.cases[row[0]];
        return link(name, address && `${address}#s${row[1]}`);
      }],
      ["structure", "", (row) => data.names[row[1]], (row) => {
        const made = cell();
        const square = element("i", null, "swatch");
        square.style.background = `rgb(${data.colors[row[1]].join(",")})`;
        made.append(square, data.names[row[1]]);
        return made;
      }],
      ["verdict", "", (row) => rank(row[2]), (row) => badge(row[2])],
      ...(data.judged ? [["est. Dice", "n", (row) => row[3], (row) => number(row[3], 2)]] : []),
      ["status", "", (row) => row[4], (row) => cell(row[4])],
      ["volume ml", "n", (row) => row[5], (row) => volume(row[5])],
      ["× median", "n", (row) => row[6], (row) => {
        const made = number(row[6], 2);
        if (row[11]) { made.textContent = ""; made.append(element("span", row[6].toFixed(2), "badge failed")); }
        return made;
      }],
      ...(data.went ? [["round trip", "n", (row) => row[7], (row) => number(row[7], 2)]] : []),
      ...(data.agreed ? [
        ["atlas · model", "n", (row) => row[8], (row) => number(row[8], 2)],
        ["result · atlas", "n", (row) => row[9], (row) => number(row[9], 2)],
      ] : []),
      ["remarks", "why", (row) => row[10], (row) => cell(row[10], "why")],
    ],
  };

  const state = { tab: "cases", column: 0, descending: false, from: 0 };
  const search = one("#search"), structure = one("#structure"), verdict = one("#verdict");
  const byCase = new Map();
  data.cases.forEach((row) => byCase.set(row, []));
  data.structures.forEach((row) => byCase.get(data.cases[row[0]]).push(row));

  function matches(row) {
    const words = search.value.trim().toLowerCase();
    const wanted = structure.value, judged = verdict ? verdict.value : "";
    const fits = (one) => (!wanted || String(one[1]) === wanted) && (!judged || one[2] === judged);
    const text = (one) => `${data.names[one[1]]} ${one[4]} ${one[10]}`.toLowerCase();
    if (state.tab === "structures") {
      return fits(row) && (!words || data.cases[row[0]][0].toLowerCase().includes(words) || text(row).includes(words));
    }
    const own = byCase.get(row);
    if (wanted || judged) { if (!own.some(fits)) return false; }
    return !words || `${row[0]} ${row[14]}`.toLowerCase().includes(words) || own.some((one) => fits(one) && text(one).includes(words));
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
    const rows = data[state.tab].filter(matches).sort((a, b) => compare(key(a), key(b)));
    state.from = Math.min(state.from, Math.max(0, Math.floor((rows.length - 1) / PAGE) * PAGE));
    one("#table tbody").replaceChildren(...rows.slice(state.from, state.from + PAGE).map((row) => {
      const made = element("tr");
      made.append(...shown.map(([, , , build]) => build(row)));
      return made;
    }));
    one("#count").textContent = `${rows.length} of ${data[state.tab].length} ${state.tab}`;
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
    if (control) control.addEventListener("input", () => { state.from = 0; draw(); });
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
