"use strict";
// Text only ever enters the page as text: no markup is parsed here.

const ENTRY_PX = 54;
const SPARE_ENTRIES = 6;
const KEPT_CHUNKS = 8;

const SORTS = {
  "in order": { of: (r, i) => i, up: true },
  "reward, lowest first": { of: (r) => r.reward, up: true },
  "reward, highest first": { of: (r) => r.reward },
  "advantage, highest first": { of: (r) => r.advantage },
  "advantage, lowest first": { of: (r) => r.advantage, up: true },
  "most tool calls": { of: (r) => r.calls },
  "most tokens": { of: (r) => r.tokens },
  "slowest": { of: (r) => r.latency_s },
};

// What a token is coloured by: [class, strength in percent], or null where there is no value.
const LOGPROB_NATS = 3, MOST = 75;
const COLOURS = {
  "mask": { of: (t) => ["high", 32], legend: "what the policy wrote and learns from; the rest is prompt, tool output and template" },
  "log-probability": {
    of: (t) => t.logprob === null ? null : ["low", MOST * Math.min(1, -t.logprob / LOGPROB_NATS)],
    ends: ["certain (0)", `surprising (−${LOGPROB_NATS} nats, a chance of 5 %, and below)`], bar: ["transparent", "var(--orange)"],
  },
  "ratio": {
    of: (t) => t.ratio === null ? null : side(Math.log(t.ratio), Math.log(2)),
    ends: ["½ and below", "2 and above: the trainer finds the token likelier than the sampler did"],
    bar: ["var(--orange)", "transparent", "var(--blue)"], missing: "no ratio here: the row had no gradient, or the run kept no figures of its updates",
  },
  "advantage": {
    of: (t) => t.advantage === null ? null : side(t.advantage, state.mostAdvantage),
    ends: () => [`−${short(state.mostAdvantage)}: made less likely`, `${short(state.mostAdvantage)}: made more likely`],
    bar: ["var(--orange)", "transparent", "var(--blue)"], missing: "no advantage here: evaluations have none, and older runs kept none",
  },
};

const state = { rollouts: [], shown: [], current: -1, tab: "conversation", colour: "mask", mostAdvantage: 1, chunks: new Map(), texts: null, tokens: [], at: -1, wanted: 0 };
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((c) => c !== null && c !== ""));
  return element;
}

const side = (x, most) => [x >= 0 ? "high" : "low", MOST * Math.min(1, Math.abs(x) / most)];
const rounded = (x, digits) => x === null ? "–" : String(Number(x.toPrecision(digits))).replace(/^-/, "−");
const short = (x) => rounded(x, 3);
const exact = (x) => rounded(x, 7);
const signed = (x) => (x > 0 ? "+" : "") + exact(x);

// ---- data

async function parsed() {
  if (document.readyState === "loading") await new Promise((done) => document.addEventListener("DOMContentLoaded", done));
}

async function unpack(id) {
  if (!$(id)) await parsed();
  const packed = atob($(id).textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function details(rollout) {
  const chunks = state.chunks, key = rollout.chunk;
  const chunk = chunks.get(key) ?? unpack(`chunk${key}`);
  chunks.delete(key);
  chunks.set(key, chunk);
  if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
  return (await chunk)[rollout.place];
}

// The tokens of all rows, each with what is known of it.
function tokensOf(rollout, record) {
  return record.rows.map((row) => {
    const tokens = row.ids.map((id, position) => ({ id, position, trained: false, version: null, logprob: null, trainer: null, ratio: null, advantage: null }));
    let n = 0;
    for (const [start, end, version] of row.sampled) {
      for (const token of tokens.slice(start, end)) {
        const logprob = row.logprobs[n] ?? null, trainer = row.trainer ? row.trainer[n] : null;
        const ratio = logprob === null || trainer === null ? null : Math.exp(trainer - logprob);
        Object.assign(token, { trained: true, version, logprob, trainer, ratio, advantage: rollout.advantage });
        n += 1;
      }
    }
    return tokens;
  });
}

// ---- filters and the list

function fill(select, values) {
  for (const [value, name] of values) $(select).append(el("option", { value }, name));
}

function fillFilters() {
  const counts = (key) => {
    const found = new Map();
    for (const r of state.rollouts) for (const v of [r[key]].flat()) found.set(v, (found.get(v) ?? 0) + 1);
    return [...found].sort((a, b) => typeof a[0] === "number" ? a[0] - b[0] : b[1] - a[1]);
  };
  for (const key of ["set", "step", "stop", "tool"]) {
    fill(key, counts(key === "tool" ? "tools" : key).map(([v, n]) => [key === "tool" ? `=${v}` : v, `${v === "" ? "?" : v} (${n})`]));
  }
  fill("tool", [["none", "no call at all"]]);
  fill("sort", Object.keys(SORTS).map((name) => [name, name]));
}

function filter() {
  const [set, step, stop, tool] = ["set", "step", "stop", "tool"].map((id) => $(id).value);
  const low = $("low").valueAsNumber, high = $("high").valueAsNumber, words = $("search").value.toLowerCase().trim();
  const keeps = (r) => (!set || r.set === set) && (!step || r.step === Number(step)) && (!stop || r.stop === stop)
    && (!tool || (tool === "none" ? r.calls === 0 : r.tools.includes(tool.slice(1))))
    && (Number.isNaN(low) || (r.reward !== null && r.reward >= low)) && (Number.isNaN(high) || (r.reward !== null && r.reward <= high))
    && (!words || r.words.includes(words));
  const { of, up } = SORTS[$("sort").value];
  const keyed = [];
  state.rollouts.forEach((r, i) => { if (keeps(r)) keyed.push([of(r, i), i]); });
  // Rollouts without the value come last, whichever way it is sorted.
  keyed.sort((a, b) => (a[0] === null) - (b[0] === null) || (a[0] === null ? 0 : up ? a[0] - b[0] : b[0] - a[0]) || a[1] - b[1]);
  state.shown = keyed.map(([, i]) => i);
  const rewards = state.shown.map((i) => state.rollouts[i].reward).filter((x) => x !== null);
  const mean = rewards.length ? `, mean reward ${short(rewards.reduce((a, b) => a + b, 0) / rewards.length)}` : "";
  $("count").textContent = `${state.shown.length.toLocaleString("en")} of ${state.rollouts.length.toLocaleString("en")} rollouts${mean}`;
  $("rows").style.height = `${state.shown.length * ENTRY_PX}px`;
  $("list").scrollTop = Math.min($("list").scrollTop, Math.max(0, state.shown.length * ENTRY_PX - $("list").clientHeight));
  drawList();
}

function entry(place) {
  const index = state.shown[place], r = state.rollouts[index];
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  return el("div", { class: "entry", role: "option", id: `entry${index}`, "aria-selected": String(index === state.current),
    "aria-setsize": state.shown.length, "aria-posinset": place + 1, "data-index": index },
  el("div", {}, el("span", {}, r.task || r.id), el("span", { class: "score", title: "reward" }, r.reward === null ? "no grade" : short(r.reward))),
  el("div", {}, el("span", {}, `${r.set}, step ${r.step} · ${r.stop.replaceAll("_", " ")}`),
    el("span", {}, `${plural(r.calls, "call")} · ${plural(r.tokens, "token")}`)));
}

function drawList() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ENTRY_PX) - SPARE_ENTRIES);
  const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ENTRY_PX) + SPARE_ENTRIES);
  const entries = [];
  for (let place = first; place < last; place++) {
    const row = entry(place);
    row.style.top = `${place * ENTRY_PX}px`;
    entries.push(row);
  }
  $("rows").replaceChildren(...entries);
  const selected = $(`entry${state.current}`);
  if (selected) list.setAttribute("aria-activedescendant", selected.id);
  else list.removeAttribute("aria-activedescendant");
}

function reveal() {
  const place = state.shown.indexOf(state.current), list = $("list");
  if (place < 0) return;
  const top = place * ENTRY_PX, bottom = top + ENTRY_PX;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
}

function move(by) {
  if (!state.shown.length) return;
  const place = state.shown.indexOf(state.current);
  const next = place < 0 ? 0 : Math.max(0, Math.min(state.shown.length - 1, place + by));
  choose(state.shown[next]);
}

async function choose(index, { link = true } = {}) {
  state.current = index;
  reveal();
  drawList();
  const rollout = state.rollouts[index], wanted = ++state.wanted;
  if (link) location.replace(`#${encodeURIComponent(rollout.id.toWellFormed?.() ?? rollout.id)}`);
  const record = await details(rollout);
  // Someone who holds the key down has gone on by now.
  if (wanted === state.wanted) await show(rollout, record);
}

// ---- one rollout

async function show(rollout, record) {
  if (state.tab === "tokens") state.texts ??= await unpack("texts");
  const facts = [["set", rollout.set], ["step", rollout.step], ["reward", short(rollout.reward)],
    ...(rollout.advantage === null ? [] : [["advantage", short(rollout.advantage)]]), ["ended by", rollout.stop.replaceAll("_", " ")],
    ["tool calls", rollout.calls], ["tokens", rollout.tokens.toLocaleString("en")], ...record.facts];
  const tab = (name) => el("button", { role: "tab", type: "button", id: `tab-${name}`, "aria-controls": "panel", "aria-selected": String(state.tab === name),
    tabindex: state.tab === name ? 0 : -1, onclick: () => openTab(name) }, name);
  const panel = el("div", { role: "tabpanel", id: "panel", "aria-labelledby": `tab-${state.tab}` });
  $("hover").hidden = true;
  const focused = $("detail").contains(document.activeElement) ? document.activeElement.id : "";
  $("detail").replaceChildren(
    el("div", { class: "top" },
      el("h2", {}, rollout.task || "rollout", el("a", { href: `#${encodeURIComponent(rollout.id.toWellFormed?.() ?? rollout.id)}`, title: "link to this rollout" }, rollout.id)),
      el("div", { class: "buttons" }, el("button", { type: "button", id: "previous", onclick: () => move(-1), title: "key k" }, "← Previous"),
        el("button", { type: "button", id: "next", onclick: () => move(1), title: "key j" }, "Next →"))),
    el("div", { class: "facts" }, ...facts.map(fact)),
    record.error ? el("p", { class: "error" }, record.error) : "",
    ...record.grades.map(grade),
    el("div", { role: "tablist", "aria-label": "Views of the rollout" }, tab("conversation"), tab("tokens")), panel);
  $("detail").scrollTop = 0;
  // The button that was pressed has just been drawn anew.
  if (focused) $(focused)?.focus({ preventScroll: true });
  if (state.tab === "tokens") drawTokens(panel, rollout, record);
  else drawConversation(panel, record);
}

async function openTab(name) {
  state.tab = name;
  if (state.current < 0) return;
  await choose(state.current, { link: false });
  $(`tab-${name}`).focus();
}

const fact = ([name, value]) => el("span", {}, `${name} `, el("b", {}, String(value)));

function grade(g) {
  return el("div", { class: "grade" },
    el("div", { class: "facts" }, el("span", {}, `${g.name} `, el("b", {}, short(g.reward))),
      ...[...g.parts, ...g.scores].map(([name, value]) => fact([name, signed(value)])), ...g.facts.map(fact)),
    g.explanation ? el("p", {}, g.explanation) : "");
}

function message(m) {
  const boxes = [m.reasoning && el("pre", { class: "thought" }, m.reasoning), m.text && el("pre", {}, m.text),
    ...m.calls.map(([name, given]) => el("pre", { class: "call" }, `${name}(${given})`))].filter(Boolean);
  const about = [m.name, ...m.facts].filter(Boolean).map((x) => ` · ${x}`).join("");
  return el("div", { class: `message ${["assistant", "tool"].includes(m.role) ? m.role : ""}` },
    el("div", { class: "role" }, el("b", {}, m.role || "?"), about, m.error ? el("span", { class: "error" }, ` · ${m.error.replaceAll("_", " ")}`) : ""),
    ...(boxes.length ? boxes : [el("span", { class: "soft" }, "(empty)")]));
}

function drawConversation(panel, record) {
  const prompt = record.messages.slice(0, record.num_prompt), rest = record.messages.slice(record.num_prompt);
  const last = prompt.at(-1), earlier = prompt.slice(0, -1);
  panel.append(
    earlier.length ? el("details", {}, el("summary", { class: "soft" }, `earlier messages of the prompt (${earlier.length})`), ...earlier.map(message)) : "",
    record.item ? el("details", {}, el("summary", { class: "soft" }, "data of the task"), el("pre", {}, record.item)) : "",
    ...[last, ...rest].filter(Boolean).map(message));
}

// ---- tokens

function drawTokens(panel, rollout, record) {
  const rows = tokensOf(rollout, record);
  state.tokens = rows.flat();
  state.at = -1;
  const option = (name, i) => el("label", { title: `key ${i + 1}` }, el("input", { type: "radio", name: "colour", value: name, checked: name === state.colour, onchange: () => paint(name) }), ` ${name}`);
  panel.append(el("div", { class: "colours" }, el("fieldset", {}, el("legend", {}, "Colour by"), ...Object.keys(COLOURS).map(option)),
    el("div", { class: "legend", id: "legend" })));
  let n = 0;
  rows.forEach((tokens, i) => {
    const trained = tokens.filter((t) => t.trained).length;
    panel.append(el("h3", {}, rows.length > 1 ? `Row ${i + 1} of ${rows.length} ` : "", el("span", { class: "soft" }, `${tokens.length.toLocaleString("en")} tokens, ${trained.toLocaleString("en")} trainable`)));
    const box = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "Tokens; the arrow keys go through them", "data-first": n, "data-last": n + tokens.length - 1,
      onmouseover: (e) => { if (e.target.dataset.n) point(Number(e.target.dataset.n)); }, onmouseleave: unpoint, onblur: unpoint, onkeydown: step });
    box.append(...tokens.map((t) => el("span", { class: "token", "data-n": n++ }, textOf(t.id))));
    panel.append(box);
  });
  if (!rows.length) panel.append(el("p", { class: "soft" }, "this rollout has no tokens: it ended before the first turn"));
  paint(state.colour);
}

const textOf = (id) => state.texts[id] ?? `⟨${id}⟩`;

function paint(name) {
  state.colour = name;
  const { of, ends, bar, legend, missing } = COLOURS[name];
  let any = false;
  for (const span of document.querySelectorAll(".token")) {
    const token = state.tokens[Number(span.dataset.n)], colour = token.trained ? of(token) : null;
    any ||= colour !== null;
    span.className = `token${token.trained ? " trained" : ""}${colour ? ` ${colour[0]}` : ""}${span.classList.contains("at") ? " at" : ""}`;
    if (colour) span.style.setProperty("--amount", colour[1].toFixed(1));
  }
  const [from, to] = typeof ends === "function" ? ends() : ends ?? [];
  const gradient = bar && el("span", { class: "bar" });
  if (gradient) gradient.style.background = `linear-gradient(to right, ${bar.join(", ")})`;
  $("legend").replaceChildren(...(!any && missing ? [missing] : gradient ? [from, gradient, to] : [legend]));
}

function point(n) {
  unpoint();
  const span = document.querySelector(`.token[data-n="${n}"]`), t = state.tokens[n], hover = $("hover");
  state.at = n;
  span.classList.add("at");
  const chance = (x) => `${exact(x)} (${(100 * Math.exp(x)).toPrecision(4)} %)`;
  const lines = [["token", `${t.id}, at position ${t.position}`], ["mask", t.trained ? `trainable, written by policy version ${t.version}` : "not trainable: context"]];
  if (t.logprob !== null) lines.push(["sampler's log-probability", chance(t.logprob)]);
  if (t.trainer !== null) lines.push(["trainer's log-probability", chance(t.trainer)]);
  if (t.ratio !== null) lines.push(["ratio", exact(t.ratio)]);
  if (t.advantage !== null) lines.push(["advantage", signed(t.advantage)]);
  hover.replaceChildren(el("code", {}, JSON.stringify(textOf(t.id))), el("dl", {}, ...lines.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  hover.hidden = false;
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const below = place.bottom + 8, fits = below + hover.offsetHeight < innerHeight;
  hover.style.left = `${Math.max(8, Math.min(place.left, innerWidth - hover.offsetWidth - 8))}px`;
  hover.style.top = `${fits ? below : Math.max(8, place.top - hover.offsetHeight - 8)}px`;
}

function unpoint() {
  document.querySelector(".token.at")?.classList.remove("at");
  $("hover").hidden = true;
}

function step(event) {
  const box = event.currentTarget, first = Number(box.dataset.first), last = Number(box.dataset.last);
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") unpoint();
  if (!by) return;
  event.preventDefault();
  const inside = state.at >= first && state.at <= last;
  const next = inside ? Math.max(first, Math.min(last, state.at + by)) : first;
  document.querySelector(`.token[data-n="${next}"]`).scrollIntoView({ block: "nearest" });
  point(next);
}

// ---- keys, links, start

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, typing = target.matches("input:not([type=radio]), select");
  if (typing) {
    if (event.key === "Escape") target.blur();
    return;
  }
  const onList = target === $("list"), colours = Object.keys(COLOURS), page = Math.max(1, Math.floor($("list").clientHeight / ENTRY_PX) - 1);
  const moves = { j: 1, k: -1, ...(onList ? { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity } : {}) };
  if (event.key in moves) move(moves[event.key]);
  else if (event.key === "/") $("search").focus();
  else if (event.key === "t" || (target.matches("[role=tab]") && ["ArrowLeft", "ArrowRight"].includes(event.key))) openTab(state.tab === "tokens" ? "conversation" : "tokens");
  else if (state.tab === "tokens" && colours[Number(event.key) - 1]) document.querySelector(`input[name=colour][value="${colours[Number(event.key) - 1]}"]`).click();
  else return;
  event.preventDefault();
}

function linked() {
  let id = location.hash.slice(1);
  try { id = decodeURIComponent(id); } catch { /* a link someone wrote by hand */ }
  return id;
}

async function follow() {
  const id = linked(), index = state.rollouts.findIndex((r) => r.id === id || r.id.toWellFormed?.() === id);
  if (index >= 0) {
    if (index !== state.current) await choose(index, { link: false });
  } else if (id) {
    state.current = -1;
    drawList();
    $("detail").replaceChildren(el("p", {}, `There is no rollout ${id} in this run.`));
  } else if (state.shown.length) await choose(state.shown[0], { link: false });
  else $("detail").replaceChildren(el("p", { class: "soft" }, "There are no rollouts here."));
}

async function start() {
  if (!("DecompressionStream" in window)) {
    $("detail").replaceChildren(el("p", { class: "error" }, "This browser can't unpack the transcripts: one of 2023 or later is needed."));
    return;
  }
  const { rollouts: columns, notes } = await unpack("index"), names = Object.keys(columns);
  state.rollouts = (columns.id ?? []).map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
  for (const r of state.rollouts) r.words = `${r.task}\n${r.id}`.toLowerCase();
  state.mostAdvantage = state.rollouts.reduce((most, r) => Math.max(most, Math.abs(r.advantage ?? 0)), 0) || 1;
  $("notes").replaceChildren(...notes.map((note) => el("li", {}, note)));
  $("notes").hidden = !notes.length;
  fillFilters();
  filter();
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("reset", () => setTimeout(filter));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("scroll", drawList, { passive: true });
  $("rows").addEventListener("click", (event) => choose(Number(event.target.closest(".entry").dataset.index)));
  new ResizeObserver(drawList).observe($("list"));
  document.addEventListener("keydown", key);
  window.addEventListener("hashchange", follow);
  await follow();
  // Painted once, then measured: what a person waits for.
  requestAnimationFrame(() => setTimeout(() => {
    performance.mark("ready");
    document.documentElement.dataset.ready = "yes";
  }));
}

start();
