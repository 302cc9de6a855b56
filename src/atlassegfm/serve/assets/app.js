// The page: the list of cases, one case in three planes and 3-D, and what can be done to its structures.

import { Refused, bytes, call, inflate, numbersOf, packed, paste } from "./wire.js";
import { PLANES, SliceView, dab } from "./slices.js";
import * as solid from "./solid.js";

const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const POLL_MS = 4000, BUSY_POLL_MS = 1000;

function element(name, text = "", kind = "", more = {}) {
  const made = Object.assign(document.createElement(name), more);
  if (text !== "") made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// What is shown; the server has the truth.
const desk = {
  client: sessionStorage.getItem("client") ?? crypto.randomUUID(), cases: [], run: null, context: null,
  id: null, name: "", version: 0, undo: 0, redo: 0, structures: [], structure: 1,
  scan: null, labels: null, maps: {}, show: { atlas: false, model: false, version: false }, annotators: [], annotator: "", colors: [[0, 0, 0]],
  shape: [1, 1, 1], spacing: [1, 1, 1], cross: [0, 0, 0], centre: [0, 0, 0], zoom: 1, active: 0,
  tool: "move", size: 8, deep: false, overwrite: false,
  window: { low: 0, high: 1 }, windows: [], opacity: 22, hidden: false, solo: false, layout: "all", busy: 0,
  color: (n) => `rgb(${desk.colors[n].join(",")})`,
  isShown: (n) => !desk.solo || n === desk.structure,
};
window.desk = desk;
sessionStorage.setItem("client", desk.client);  // the same after the page is loaded again

const views = all(".view").slice(0, 3).map((box, n) => new SliceView(box.firstElementChild, n));
let cursor = null, drawing = false;

const outdated = new Set();
function draw(only = null) {
  for (const view of only ? [only] : views) outdated.add(view);
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const view of outdated) {
      if (view.canvas.offsetParent) view.draw(desk, cursor?.view === view ? cursor : null);
    }
    outdated.clear();
    where();
  });
}

let solidTimer = 0;
function drawSolid() {
  clearTimeout(solidTimer);
  if (!one("#solid").offsetParent || desk.id === null) return;
  if (!solid.hasWebGL) {
    one("#solid-note").textContent = "3-D needs WebGL 2, which this browser does not have. The slices are complete without it.";
    return;
  }
  solidTimer = setTimeout(() => solid.show(desk, one("#solid")).then(() => {
    one("#solid-note").textContent = "";
    document.body.dataset.solid = "ready";
  }).catch((error) => { one("#solid-note").textContent = `3-D cannot be shown (${error.message}).`; }), 300);
}

function say(text, kind = "") {
  one("#message").textContent = text;
  one("#message").className = kind;
}

function where() {
  if (!desk.scan) return;
  const [i, j, k] = desk.cross, at = i + desk.shape[0] * (j + desk.shape[1] * k);
  const mm = desk.affine.slice(0, 3).map((row) => row[0] * i + row[1] * j + row[2] * k + row[3]);
  const letters = [["R", "L"], ["A", "P"], ["S", "I"]];
  const place = mm.map((n, axis) => `${letters[axis][n >= 0 ? 0 : 1]} ${Math.abs(n).toFixed(0)}`).join("  ");
  const value = desk.scan[at] * desk.slope + desk.intercept, number = desk.labels[at];
  one("#where").textContent = `${number ? `${desk.structures[number - 1].name} · ` : ""}${+value.toPrecision(4)} · ${place} mm`;
}

// The list of cases

const MARKS = { accepted: "accepted", failed: "failed", waiting: "waiting", "no scan": "no scan" };

let listed = "";
function showList() {
  // Only where something changed: the focus would be lost.
  const now = JSON.stringify([desk.cases, desk.id, one("#filter").value, desk.run?.stages]);
  if (now === listed) return;
  listed = now;
  const focused = document.activeElement?.dataset?.case;
  const wanted = one("#filter").value.toLowerCase();
  const rows = desk.cases.filter((row) => `${row.name} ${row.worst}`.toLowerCase().includes(wanted));
  one("#cases").replaceChildren(...rows.map((row) => {
    const item = element("li"), button = element("button", "", row.id === desk.id ? "current" : "", { type: "button" });
    button.dataset.case = row.id;
    if (row.id === desk.id) button.setAttribute("aria-current", "true");
    const head = element("span", "", "head");
    head.append(element("b", row.name));
    const mark = MARKS[row.state] ?? row.verdict;
    if (mark) head.append(element("span", mark, `badge ${mark.replace(" ", "-")}`));
    button.append(head);
    const stage = desk.run?.stages[row.name];
    const notes = [stage && `${stage} …`, row.taken.length && `also here: ${row.taken.join(", ")}`, row.draft && "edits not accepted"];
    for (const note of notes.filter(Boolean)) button.append(element("span", note, "note"));
    if (row.worst && !stage) button.append(element("span", row.worst, "why"));
    if (row.state === "accepted" && row.by) button.append(element("span", `by ${row.by}`, "why"));
    button.addEventListener("click", () => open(row.id));
    item.append(button);
    return item;
  }));
  if (focused) one(`[data-case="${focused}"]`)?.focus();
  const accepted = desk.cases.filter((row) => row.state === "accepted").length;
  one("#tally").textContent = `${accepted} of ${desk.cases.length} accepted`;
  const others = desk.cases.find((row) => row.id === desk.id)?.taken ?? [];
  one("#taken").hidden = !others.length;
  one("#taken").textContent = `Also at this case: ${others.join(", ")}. Whoever saves later is told.`;
}

function showRun() {
  const { run, context } = desk;
  one("#run").hidden = !run;
  if (!run) return;
  const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  one("#context").textContent = `${context.name}: ${count(context.atlases, "atlas").replace("atlass", "atlases")}, model ${context.model}`;
  const running = run.state === "running", { done = 0, failed = 0, left = 0, kept = 0 } = run.counts;
  const waiting = desk.cases.filter((row) => row.state === "waiting" || row.state === "failed").length;
  const open = desk.cases.filter((row) => row.state === "open").length;
  one("#start").textContent = waiting ? `Segment ${count(waiting, "case")}` : "Redo what is open";
  one("#start").hidden = running || !(waiting || open);
  one("#stop").hidden = one("#progress").hidden = !running;
  const total = done + failed + left - kept;
  one("#done").style.width = `${total ? (100 * (done - kept + failed)) / total : 0}%`;
  one("#stage-text").textContent = total
    ? `${done - kept + failed} of ${total} done${Object.entries(run.stages).map(([, stage]) => `, ${stage}`).join("")}` : "reading the context";
  one("#compare").hidden = running || !run.compared.length;
  const ended = { failed: `The run ended: ${run.reason}`, stopped: "The run was stopped; what was done is kept." }[run.state];
  const nothing = run.state === "done" && done === kept ? "Nothing to do: every result is up to date." : "";
  const drafts = run.drafts.length ? `Not redone, as their edits are not accepted: ${run.drafts.join(", ")}.` : "";
  one("#run-note").textContent = [ended, nothing, drafts].filter(Boolean).join(" ");
}

function showChanges() {
  const cell = (found) => {
    const made = element("td");
    if (found?.[0]) made.append(element("span", found[0], `badge ${found[0]}`));
    made.append(found?.[1] == null ? "" : ` ${found[1].toFixed(2)}`);
    return made;
  };
  one("#changes tbody").replaceChildren(...desk.run.compared.map((row) => {
    const made = element("tr");
    made.append(element("td", row.case), element("td", row.structure), cell(row.before), cell(row.after));
    return made;
  }));
  one("#changes").showModal();
}

let pollTimer = 0;
async function poll() {
  clearTimeout(pollTimer);
  try {
    const state = await call("state", { client: desk.client, by: who(), case: desk.id });
    const ended = desk.run?.state === "running" && state.run?.state !== "running";
    Object.assign(desk, { cases: state.cases, run: state.run, context: state.context });
    one("#title").textContent = state.title || "AtlasSegFM";
    showList();
    showRun();
    if (ended && desk.id !== null) await open(desk.id, true);
    if (ended && desk.run.compared.length) showChanges();
    delete document.body.dataset.lost;
  } catch (error) {
    document.body.dataset.lost = "true";
    say(error.message, "bad");
  }
  pollTimer = setTimeout(poll, desk.run?.state === "running" ? BUSY_POLL_MS : POLL_MS);
}

addEventListener("pagehide", () => {
  const gone = new Blob([JSON.stringify({ client: desk.client, case: null })], { type: "application/json" });
  navigator.sendBeacon(new URL("api/state", new URL(".", location.href)), gone);
});

const who = () => one("#who").value.trim();

// One case

async function open(id, again = false) {
  if (id === desk.id && !again) return;
  const row = desk.cases.find((found) => found.id === id), same = id === desk.id;
  desk.id = id;
  history.replaceState(null, "", `#${id}`);
  showList();
  document.body.dataset.state = "loading";
  one("#empty").textContent = "loading …";
  one("#case-name").textContent = row?.name ?? "";
  if (row && !["open", "accepted"].includes(row.state)) {
    const reasons = { waiting: `This case has no result yet${desk.run ? ": the button at the lower left segments it" : ""}.`, failed: row.worst, "no scan": "The scan of this case was not given." };
    Object.assign(desk, { scan: null, labels: null, structures: [], name: row.name });
    one("#empty").textContent = reasons[row.state];
    document.body.dataset.state = "empty";
    showStructures();
    return;
  }
  try {
    const [detail, scan] = await Promise.all([call(`cases/${id}`), same && desk.scan ? null : bytes(`cases/${id}/scan`)]);
    const labels = numbersOf(await inflate(await bytes(`cases/${id}/labels/draft`)), detail.bytes);
    if (id !== desk.id) return;
    Object.assign(desk, detail, { name: row?.name ?? "", labels, maps: {}, annotator: detail.annotators[0] ?? "" });
    if (scan) desk.scan = new Int16Array(scan.buffer);
    desk.colors = [[0, 0, 0], ...detail.structures.map((found) => found.color)];
    if (!same) {
      desk.structure = worst();
      Object.assign(desk, { zoom: 1, solo: false, hidden: false, window: { ...detail.windows[0] } });
      home();
      look(centre(desk.structure) ?? detail.shape.map((n) => n / 2));
    }
    one("#window").replaceChildren(...detail.windows.map((found, n) => element("option", found.name, "", { value: n })), element("option", "by hand", "", { value: "hand", hidden: true }));
    for (const kind of ["atlas", "model", "version"]) {
      if (desk.show[kind]) await showMap(kind);
    }
    one("#case-name").textContent = desk.name;
    document.body.dataset.state = "ready";
    say(desk.structures.length ? "" : "This result has no structures.");
    showStructures();
    draw();
    drawSolid();
  } catch (error) {
    if (id !== desk.id) return;
    desk.scan = null;
    document.body.dataset.state = "empty";
    one("#empty").textContent = error.message;
  }
}

function worst() {
  const rank = { failed: 0, review: 1, good: 3, accepted: 9 };
  const keys = desk.structures.map((found) => (rank[found.verdict] ?? 2) + 0.9 * (found.estimate ?? 0));
  return keys.length ? keys.indexOf(Math.min(...keys)) + 1 : 1;
}

const home = () => { desk.centre = desk.shape.map((n) => (n - 1) / 2); desk.zoom = 1; };
const look = (voxel) => { desk.cross = voxel.map((n, axis) => Math.max(0, Math.min(desk.shape[axis] - 1, Math.round(n)))); };

async function showMap(kind) {
  const id = desk.id, whose = desk.annotator;
  if (kind === "version" ? !whose : !desk.sources.includes(kind)) return;
  const sent = await (kind === "version" ? bytes(`cases/${id}/version`, { name: whose }) : bytes(`cases/${id}/labels/${kind}`));
  const found = numbersOf(await inflate(sent), desk.bytes);
  if (id === desk.id && whose === desk.annotator) desk.maps[kind] = found;
  draw();
}

function showStructures() {
  const rows = desk.structures.map((found, n) => {
    const item = element("li", "", n + 1 === desk.structure ? "current" : ""), button = element("button", "", "head", { type: "button" });
    button.dataset.structure = n + 1;
    button.setAttribute("aria-pressed", String(n + 1 === desk.structure));
    const swatch = element("i", "", "swatch");
    swatch.style.background = desk.color(n + 1);
    const ml = found.volume >= 99.5 ? found.volume.toFixed(0) : String(+found.volume.toPrecision(3));
    button.append(swatch, element("b", found.name), element("span", `${ml} ml`, "ml"));
    if (found.verdict) button.append(element("span", found.verdict, `badge ${found.verdict}`));
    button.addEventListener("click", () => choose(n + 1, true));
    item.append(button);
    if (n + 1 === desk.structure) item.append(...detailOf(found, n + 1));
    return item;
  });
  one("#structures").replaceChildren(...rows);
  one("#undo").disabled = !desk.undo;
  one("#redo").disabled = !desk.redo;
  const allAccepted = desk.structures.length > 0 && desk.structures.every((found) => found.accepted);
  one("#accept-case").hidden = !desk.structures.length;
  one("#accept-case").disabled = allAccepted || !desk.structures.length;
  one("#accept-case").textContent = allAccepted ? "Case accepted" : "Accept case";
  const isAtlas = Boolean(desk.context?.files.includes(desk.file));
  one("#atlas").hidden = !desk.context || !allAccepted;
  one("#atlas").disabled = isAtlas;
  one("#atlas").textContent = isAtlas ? "An atlas of the context" : "Make it an atlas";
}

function detailOf(found, n) {
  const box = element("div", "", "detail"), buttons = element("div", "", "verbs");
  const add = (text, key, work, kind = "", group = buttons) => {
    const button = element("button", text, kind, { type: "button", title: key });
    button.addEventListener("click", work);
    group.append(button);
  };
  if (found.reason) box.append(element("p", found.reason, "why"));
  if (found.dice != null && found.dice < 0.9995) box.append(element("p", `Dice with the automatic answer ${found.dice.toFixed(3)}`, "why"));
  if (found.accepted) {
    add("Open again", "R", () => reopen([n]));
  } else {
    add("Accept", "A", () => accept([n]), "primary");
    if (desk.sources.includes("atlas")) add("Take atlas's", "G", () => edit("atlas"));
    if (desk.sources.includes("model")) add("Take model's", "M", () => edit("model"));
    add("Interpolate", "Between drawn slices of the active plane (I)", () => act("interpolate"));
    add("Fill holes", "On the active slice; in 3-D with the 3-D brush (F)", () => act("fill"));
    add("Absent", "The scan does not show it (Delete)", () => edit("absent"));
    add("Reset", "As it was computed (Backspace)", () => edit("reset"));
  }
  const look = element("div", "", "verbs look");
  add(desk.solo ? "Show all" : "Only this", "U", () => act("solo"), "", look);
  if (desk.sources.length === 2) add("Go to disagreement", "Where atlas and model differ most (J)", () => act("jump"), "", look);
  const outlines = element("span", "", "outlines");
  if (desk.sources.length) look.append(outlines);
  for (const kind of desk.sources) outlines.append(outlineSwitch(kind, kind, `Outline of the ${kind}'s answer (K)`));
  box.append(buttons, look);
  if (desk.annotators.length) box.append(versionsOf(found, add));
  const others = desk.structures.map((other, m) => [other, m + 1]).filter(([other, m]) => m !== n && !other.accepted);
  if (!found.accepted && others.length) {
    const row = element("div", "", "verbs"), list = element("select", "", "", { id: "other" });
    list.setAttribute("aria-label", "the other structure");
    list.append(...others.map(([other, m]) => element("option", other.name, "", { value: m })));
    row.append(list);
    for (const [verb, text, title] of [["relabel", "It is this", "All of it becomes the structure on the left (L)"], ["swap", "Swap", "Exchange the two (Shift X)"]]) {
      const button = element("button", text, "", { type: "button", title });
      button.addEventListener("click", () => edit(verb, { other: Number(list.value) }));
      row.append(button);
    }
    box.append(row);
  }
  return [box];
}

function outlineSwitch(kind, text, title) {
  const label = element("label", "", "switch", { title });
  const tick = element("input", "", "", { type: "checkbox", checked: desk.show[kind] });
  tick.addEventListener("change", () => outline(kind, tick.checked));
  label.append(tick, element("i", "", `key-${kind}`), text);
  return label;
}

// What each person accepted last, to look at and to take.
function versionsOf(found, add) {
  const row = element("div", "", "verbs"), list = element("select", "", "", { id: "annotator" });
  list.setAttribute("aria-label", "whose version");
  list.append(...desk.annotators.map((name) => element("option", name, "", { value: name, selected: name === desk.annotator })));
  list.addEventListener("change", () => {
    desk.annotator = list.value;
    delete desk.maps.version;
    outline("version", desk.show.version);
  });
  row.append(list);
  if (!found.accepted) add("Take", "This structure as they accepted it last", () => edit("version", { annotator: desk.annotator }), "", row);
  row.append(outlineSwitch("version", "version", "Outline of what they accepted last"));
  return row;
}

function outline(kind, wanted) {
  desk.show[kind] = wanted;
  if (wanted && !desk.maps[kind]) showMap(kind).catch(report);
  draw();
}

function choose(n, go = false) {
  if (!desk.structures.length) return;
  desk.structure = ((n - 1 + desk.structures.length) % desk.structures.length) + 1;
  const there = go && centre(desk.structure);
  if (there) look(there);
  showStructures();
  draw();
  if (desk.solo) drawSolid();
}

// A voxel of a structure in the draft: on the axial slice where it is largest.
function centre(n) {
  const [nx, ny, nz] = desk.shape, areas = new Float64Array(nz), sums = [new Float64Array(nz), new Float64Array(nz)];
  for (let k = 0, at = 0; k < nz; k++) {
    for (let j = 0; j < ny; j++) {
      for (let i = 0; i < nx; i++, at++) {
        if (desk.labels[at] !== n) continue;
        areas[k]++;
        sums[0][k] += i;
        sums[1][k] += j;
      }
    }
  }
  const k = areas.indexOf(Math.max(...areas));
  return areas[k] ? [sums[0][k] / areas[k], sums[1][k] / areas[k], k] : null;
}

// Edits, one after the other

let queue = Promise.resolve();
function enqueue(work) {
  desk.busy++;
  document.body.dataset.busy = "true";
  queue = queue.then(work).catch(report).finally(() => {
    if (!--desk.busy) delete document.body.dataset.busy;
  });
  return queue;
}

async function report(error) {
  say(error.message, "bad");
  // What was drawn here may not be what the server has.
  if (error instanceof Refused && desk.id !== null && error.status !== 0) await reload();
}

async function reload() {
  const detail = await call(`cases/${desk.id}`);
  const labels = numbersOf(await inflate(await bytes(`cases/${desk.id}/labels/draft`)), detail.bytes);
  Object.assign(desk, detail, { labels });
  showStructures();
  draw();
}

async function post(what, body, id = desk.id) {
  const answer = await call(`cases/${id}/${what}`, { version: desk.version, by: who(), ...body });
  if (id !== desk.id) return answer;
  if (answer.changed) await paste(desk.labels, desk.shape, answer.changed, desk.bytes);
  Object.assign(desk, { version: answer.version, undo: answer.undo, redo: answer.redo, structures: answer.structures, annotators: answer.annotators });
  if (!desk.annotators.includes(desk.annotator)) desk.annotator = desk.annotators[0] ?? "";
  showStructures();
  draw();
  drawSolid();
  return answer;
}

function edit(verb, more = {}) {
  const n = desk.structure, id = desk.id, before = performance.now();
  if (desk.structures[n - 1]?.accepted) return say(`${desk.structures[n - 1].name} is accepted; open it again to change it (R)`, "bad");
  return enqueue(async () => {
    const old = desk.structures[n - 1].volume;
    const answer = await post("edit", { verb, structure: n, overwrite: desk.overwrite, ...(await more) }, id);
    const seconds = ((performance.now() - before) / 1000).toFixed(1), name = answer.structures[n - 1].name;
    const grown = answer.structures[n - 1].volume - old;
    const parts = [answer.changed ? `${name} ${grown >= 0 ? "+" : "−"}${Math.abs(grown).toPrecision(2)} ml` : `${name}: nothing changed`];
    if (verb === "click") parts[0] += `, answered in ${seconds} s`;
    for (const [other, voxels] of Object.entries(answer.others)) {
      parts.push(voxels > 0 ? `${voxels} voxels stay with ${other}${locked(other)}` : `${-voxels} voxels taken from ${other}`);
    }
    say(parts.join("; "));
    poll();
  });
}

const locked = (name) => (desk.structures.find((found) => found.name === name)?.accepted ? ", which is accepted" : " (O overwrites)");
const step = (what) => enqueue(async () => {
  const answer = await post(what, {});
  say(answer.changed ? "" : `nothing to ${what}`);
});
const accept = (structures = null) => enqueue(async () => {
  await post("accept", { structures });
  delete desk.maps.version;
  if (desk.show.version) await showMap("version");
  const left = desk.structures.filter((found) => !found.accepted).length;
  const others = desk.annotators.filter((name) => name !== who()), kept = others.length ? `; kept beside it: the version by ${others.join(", ")}` : "";
  say((left ? `accepted; ${left} left` : "the case is accepted, and on the disk") + kept);
  if (structures && left) choose(worst(), true);
  await poll();
});
const reopen = (structures) => enqueue(async () => {
  await post("reopen", { structures });
  await poll();
});
const makeAtlas = () => enqueue(async () => {
  desk.context = await call(`cases/${desk.id}/atlas`, {});
  say(`the case is atlas ${desk.context.atlases} of the context; “Redo what is open” uses it`);
  showRun();
  showStructures();
  one("#start").focus();
});
const runAgain = () => enqueue(async () => {
  desk.run = await call("run", {});
  await poll();
});

// Pointer

let stroke = null;
const places = new Set();

function paintAt(view, x, y) {
  const to = view.voxelAt(desk, x, y), from = stroke.last ?? to;
  const far = Math.hypot(...to.map((n, axis) => (n - from[axis]) * desk.spacing[axis]));
  const steps = Math.max(1, Math.ceil(far / Math.max(desk.size / 4, Math.min(...desk.spacing))));
  const taken = new Set(desk.structures.flatMap((found, n) => (found.accepted ? [n + 1] : [])));
  for (let n = 1; n <= steps; n++) {
    const at = from.map((value, axis) => value + ((to[axis] - value) * n) / steps);
    for (const place of dab(desk, view, at, desk.deep)) {
      places.add(place);
      const here = desk.labels[place];
      if (desk.tool === "erase") {
        if (here === desk.structure) desk.labels[place] = 0;
      } else if (!here || (desk.overwrite && !taken.has(here))) desk.labels[place] = desk.structure;
    }
  }
  stroke.last = to;
  draw();
}

function endStroke() {
  const verb = stroke.tool;
  stroke = null;
  if (!places.size) return;
  const drawn = packed([...places], desk.shape);
  places.clear();
  edit(verb, drawn);
}

// A click outside a structure says that the place belongs to it, one inside that it does not.
function clickAt(voxel) {
  const ijk = voxel.map((n, axis) => Math.max(0, Math.min(desk.shape[axis] - 1, Math.round(n))));
  look(ijk);
  say("the built-in model answers …");
  const inside = desk.labels[ijk[0] + desk.shape[0] * (ijk[1] + desk.shape[1] * ijk[2])] === desk.structure;
  edit("click", { ijk, positive: !inside });
}

for (const view of views) {
  const { canvas } = view;
  let drag = null;
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    if (!desk.scan) return;
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    desk.active = view.number;
    const { offsetX: x, offsetY: y } = event, open = desk.structures[desk.structure - 1] && !desk.structures[desk.structure - 1].accepted;
    if (event.button === 1) drag = { kind: "pan", x, y, centre: [...desk.centre] };
    else if (event.button === 2) drag = { kind: "window", x, y, ...desk.window };
    else if (desk.tool === "click") clickAt(view.voxelAt(desk, x, y));
    else if (desk.tool === "paint" || desk.tool === "erase") {
      if (!open) return say(`${desk.structures[desk.structure - 1]?.name ?? "nothing"} is accepted; open it again to change it (R)`, "bad");
      look(view.voxelAt(desk, x, y));
      stroke = { tool: desk.tool, last: null };
      paintAt(view, x, y);
    } else {
      drag = { kind: "look" };
      look(view.voxelAt(desk, x, y));
    }
    event.preventDefault();
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    const { offsetX: x, offsetY: y } = event;
    cursor = { view, x, y };
    if (stroke) paintAt(view, x, y);
    else if (drag?.kind === "look") look(view.voxelAt(desk, x, y));
    else if (drag?.kind === "pan") {
      const { px, py } = view.layout(desk);
      desk.centre[view.right] = drag.centre[view.right] + (x - drag.x) / px;
      desk.centre[view.down] = drag.centre[view.down] + (y - drag.y) / py;
    } else if (drag?.kind === "window") {
      const width = drag.high - drag.low, level = (drag.high + drag.low) / 2 - ((y - drag.y) * width) / 300;
      const wide = Math.max(width * Math.exp((x - drag.x) / 200), 1e-6);
      desk.window = { low: level - wide / 2, high: level + wide / 2 };
      one("#window").value = "hand";
    }
    draw(stroke || drag ? null : view);
  });
  const end = () => {
    drag = null;
    if (stroke) endStroke();
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => { cursor = null; draw(view); });
  canvas.addEventListener("dblclick", () => desk.tool === "move" && arrange(desk.layout === "all" ? String(view.number) : "all"));
  canvas.addEventListener("focus", () => { desk.active = view.number; draw(); });
  canvas.addEventListener("wheel", (event) => {
    if (!desk.scan) return;
    event.preventDefault();
    desk.active = view.number;
    if (event.ctrlKey) zoom(Math.exp(-event.deltaY / 300), view, event.offsetX, event.offsetY);
    else scroll(view, event.deltaY > 0 ? -1 : 1);
  }, { passive: false });
}

function scroll(view, by) {
  const cross = [...desk.cross];
  cross[view.normal] += by;
  look(cross);
  draw();
}

function zoom(factor, view = views[desk.active], x = null, y = null) {
  const { width, height } = view.layout(desk);
  const at = view.voxelAt(desk, x ?? width / 2, y ?? height / 2), before = desk.zoom;
  desk.zoom = Math.max(1, Math.min(30, desk.zoom * factor));
  for (const axis of [view.right, view.down]) desk.centre[axis] = at[axis] + (desk.centre[axis] - at[axis]) * (before / desk.zoom);
  if (desk.zoom === 1) home();
  draw();
}

function arrange(layout) {
  desk.layout = layout;
  one("#views").className = layout === "all" ? "all" : `only${layout}`;
  if (layout in views) desk.active = Number(layout);
  solid.resize();
  draw();
  drawSolid();
}

// Keys

const set = (name, value) => {
  desk[name] = value;
  showTools();
  draw();
};
const HINTS = {
  move: "Click or drag: the crosshair. Double click: one plane.", click: "Click into an error: outside the structure to add, inside to take away; the built-in model answers.",
  paint: "Draw on the slice; some slices are enough, I interpolates between them.", erase: "Erase the chosen structure on the slice.",
};
const take = (tool) => { set("tool", tool); say(HINTS[tool]); };
const act = (verb) => actions[verb]();
const view = () => views[desk.active] ?? views[0];
const move = (axis, by) => {
  const cross = [...desk.cross];
  cross[axis] += by;
  look(cross);
  draw();
};
const follow = (by) => {
  const ids = [...one("#cases").querySelectorAll("[data-case]")].map((button) => Number(button.dataset.case));
  if (ids.length) open(ids[(ids.indexOf(desk.id) + by + ids.length) % ids.length]);
};
const actions = {
  interpolate: () => edit("interpolate", { axis: view().normal }),
  fill: () => edit("fill", desk.deep ? { axis: null } : { axis: view().normal, ijk: desk.cross }),
  solo: () => { desk.solo = !desk.solo; showStructures(); draw(); drawSolid(); },
  jump: () => {
    const id = desk.id;
    call(`cases/${id}/disagreement/${desk.structure}`).then(({ ijk }) => {
      if (!ijk) return say("atlas and model agree here, or were not kept");
      if (id === desk.id) look(ijk);
      return draw();
    }).catch(report);
  },
  use: () => {
    if (desk.tool === "click") return clickAt(desk.cross);
    if (desk.tool === "move") return undefined;
    stroke = { tool: desk.tool, last: null };
    const [x, y] = view().pointOf(desk, desk.cross);
    paintAt(view(), x, y);
    return endStroke();
  },
  window: () => {
    const list = one("#window");
    list.value = String((Number(list.value) + 1 || 0) % desk.windows.length);
    list.dispatchEvent(new Event("change"));
  },
};

const KEYS = [
  ["Cases", [
    ["N", "next case", "n", () => follow(1)], ["P", "previous case", "p", () => follow(-1)],
    ["Shift A", "accept the case", "A", () => accept()], ["Shift T", "make it an atlas", "T", () => one("#atlas").hidden || one("#atlas").disabled || makeAtlas()],
    ["Shift G", "segment, or redo what is open", "G", () => one("#start").hidden || runAgain()],
    ["/", "filter the list", "/", () => one("#filter").focus()],
  ]],
  ["Structures", [
    ["S", "next", "s", () => choose(desk.structure + 1, true)], ["Shift S", "previous", "S", () => choose(desk.structure - 1, true)],
    ["A", "accept", "a", () => accept([desk.structure])], ["R", "open again", "r", () => reopen([desk.structure])],
    ["U", "show only this one", "u", () => act("solo")], ["H", "hide all", "h", () => set("hidden", !desk.hidden)],
    ["J", "to the largest disagreement", "j", () => act("jump")],
    ["K", "outlines of atlas and model", "k", () => {
      const wanted = !desk.sources.every((kind) => desk.show[kind]);
      for (const kind of desk.sources) outline(kind, wanted);
      showStructures();
    }],
  ]],
  ["Correct", [
    ["V", "look", "v", () => take("move")], ["C", "click into an error", "c", () => take("click")],
    ["B", "brush", "b", () => take("paint")], ["E", "eraser", "e", () => take("erase")],
    ["[  ]", "size of the brush", "[", () => set("size", Math.max(1, desk.size - 1))], ["", "", "]", () => set("size", Math.min(40, desk.size + 1))],
    ["D", "brush in 3-D", "d", () => set("deep", !desk.deep)], ["O", "overwrite others that are not accepted", "o", () => set("overwrite", !desk.overwrite)],
    ["Enter", "use the tool at the crosshair", "Enter", () => act("use")],
    ["Z", "undo", "z", () => step("undo")], ["Y", "redo", "y", () => step("redo")],
    ["I", "interpolate between drawn slices", "i", () => act("interpolate")], ["F", "fill holes", "f", () => act("fill")],
    ["G", "take the atlas's answer", "g", () => edit("atlas")], ["M", "take the model's answer", "m", () => edit("model")],
    ["Backspace", "reset", "Backspace", () => edit("reset")], ["Delete", "absent", "Delete", () => edit("absent")],
    ["L", "relabel to the chosen one", "l", () => one("#other") && edit("relabel", { other: Number(one("#other").value) })],
    ["Shift X", "swap with the chosen one", "X", () => one("#other") && edit("swap", { other: Number(one("#other").value) })],
  ]],
  ["Look", [
    ["1 2 3 4", "one plane, or 3-D", "1", () => arrange("0")], ["", "", "2", () => arrange("1")], ["", "", "3", () => arrange("2")], ["", "", "4", () => arrange("3")],
    ["0", "all", "0", () => arrange("all")], [",  .", "slices", ",", () => scroll(view(), -1)], ["", "", ".", () => scroll(view(), 1)],
    ["Arrows", "move the crosshair", "ArrowLeft", () => move(view().right, 1)], ["", "", "ArrowRight", () => move(view().right, -1)],
    ["", "", "ArrowUp", () => move(view().down, 1)], ["", "", "ArrowDown", () => move(view().down, -1)],
    ["", "", "PageUp", () => scroll(view(), 1)], ["", "", "PageDown", () => scroll(view(), -1)],
    ["+  −", "zoom", "+", () => zoom(1.25)], ["", "", "-", () => zoom(0.8)], ["", "", "=", () => zoom(1.25)], ["Home", "whole picture", "Home", () => { home(); draw(); }],
    ["W", "next window", "w", () => act("window")], ["?", "this help", "?", () => one("#help").showModal()],
  ]],
];
const bindings = new Map(KEYS.flatMap(([, keys]) => keys.map(([, , key, work]) => [key, work])));

addEventListener("keydown", (event) => {
  if (one("dialog[open]") || event.altKey) return;
  const typing = event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing) return;
  const onButton = event.target.matches("button, input") && (event.key === "Enter" || event.key === " ");
  const onRange = event.target.matches("[type=range]") && event.key.startsWith("Arrow");
  if (onButton || onRange) return;
  let key = event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") key = "z";
    else if (key === "y" || key === "Z") key = "y";
    else return;
  }
  const work = bindings.get(key);
  if (!work) return;
  event.preventDefault();
  if (desk.scan || "npG/?".includes(key)) work();
});

// Controls

function showTools() {
  for (const button of all("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === desk.tool));
  const brushes = desk.tool === "paint" || desk.tool === "erase";
  for (const part of all("[data-for]")) part.hidden = part.dataset.for === "brush" ? !brushes : part.dataset.for !== desk.tool;
  one("#size").value = desk.size;
  one("#size-text").textContent = `${desk.size} mm`;
  one("#deep").checked = desk.deep;
  one("#overwrite").checked = desk.overwrite;
}

for (const button of all("[data-tool]")) button.addEventListener("click", () => take(button.dataset.tool));
for (const name of ["deep", "overwrite"]) one(`#${name}`).addEventListener("change", (event) => set(name, event.target.checked));
for (const name of ["size", "opacity"]) one(`#${name}`).addEventListener("input", (event) => set(name, Number(event.target.value)));
one("#window").addEventListener("change", (event) => { desk.window = { ...(desk.windows[event.target.value] ?? desk.window) }; draw(); });
one("#undo").addEventListener("click", () => step("undo"));
one("#redo").addEventListener("click", () => step("redo"));
one("#accept-case").addEventListener("click", () => accept());
one("#atlas").addEventListener("click", makeAtlas);
one("#start").addEventListener("click", runAgain);
one("#stop").addEventListener("click", () => enqueue(async () => { desk.run = await call("run/stop", {}); await poll(); }));
one("#compare").addEventListener("click", showChanges);
one("#help-button").addEventListener("click", () => one("#help").showModal());
one("#filter").addEventListener("input", showList);
one("#who").value = localStorage.getItem("who") ?? "";
one("#who").addEventListener("change", () => localStorage.setItem("who", who()));
new ResizeObserver(() => { solid.resize(); draw(); }).observe(one("#views"));
one("#keys").replaceChildren(...KEYS.map(([title, keys]) => {
  const part = element("section");
  part.append(element("h3", title), ...keys.filter(([shown]) => shown).map(([shown, text]) => {
    const row = element("p");
    row.append(element("kbd", shown), text);
    return row;
  }));
  return part;
}));

showTools();
await poll();
const asked = Number(location.hash.slice(1)), first = desk.cases.find((row) => location.hash && row.id === asked) ?? desk.cases[0];
if (first) await open(first.id);
else one("#empty").textContent = "There are no cases.";
await poll();
document.body.dataset.page = "ready";
