"use strict";
// The page of a run. Every text of a model or a file is put in with textContent, never as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { run: 0, step: 0, quantity: "", update: "loss", row: 0, token: -1, pinned: null, spans: [] };
const RUN = () => DATA.runs[state.run];
const RECORD = () => RUN().records[state.step];

// ---- small helpers
function build(element, { text, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}
const make = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
// The namespace is that of an <svg> of this page: written out, it would be an address.
const draw = (tag, attributes) => build(document.createElementNS($("svg").namespaceURI, tag), attributes, []);

// Controls, marks that turn text around, and halves of a character, as nanorlhf.errors.visible shows them.
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const visible = (text) =>
  String(text).replace(CONTROLS, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));

const number = (x) => (x === null || x === undefined || Number.isNaN(x) ? "none" : short(x).replaceAll("-", "−"));
function short(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-4) return x.toExponential(3).replace(/\.?0+e/, "e");
  return String(Number(x.toPrecision(6)));
}
const derived = (x) => Number(x.toPrecision(4)); // of what this page computes itself
const term = (x) => (x < 0 ? `(${number(x)})` : number(x));
const column = (run, name) => run.metrics[name] || [];

// ---- what is known of a token: (row, j) → a number, or undefined. j counts the tokens inside the mask
const value = (row, name, j) => (Array.isArray(row[name]) ? row[name][j] : row[name]) ?? undefined; // null: was not finite
const logp = (row, j) => value(row, "old_logp", j) ?? value(row, "logp", j);
const refLogp = (row, j) => value(row, "ref_logp", j) ?? value(row, "teacher_logp", j);
const logRatio = (row, j) => value(row, "log_ratio", j);
function runningSum(row, j) {
  let sum = 0;
  row.sums ??= row.positions.map((_, k) => derived((sum += logRatio(row, k))));
  return row.sums[j];
}
function ratio(row, j, update = state.update) {
  if (!row.ratio) return undefined;
  return value(row.ratio, update === "loss" ? (row.update || [])[0] : Number(update), j);
}
function clipRange(run) {
  const { clip, clip_low, clip_high, loss } = run.config;
  if (run.kind === "ppo") return [1 - clip, 1 + clip];
  return run.kind === "grpo" && loss === "clip" ? [1 - clip_low, 1 + clip_high] : null;
}
// Which corner of the clip acts: 1 and −1 where max(−Aρ, −A clip ρ) takes the clipped one, so that the token
// has no gradient; 0 where it takes Aρ.
function corner(row, j, update) {
  const range = clipRange(RUN());
  const rho = ratio(row, j, update), adv = value(row, "adv", j);
  if (!range || rho === undefined || adv === undefined) return undefined;
  return adv > 0 && rho > range[1] ? 1 : adv < 0 && rho < range[0] ? -1 : 0;
}
const change = (row, j) => derived(value(row, "value", j) - value(row, "value", j - 1));

// How the numbers of a quantity are found: those that are not named here stand in the row under their key.
const GET = {
  logp,
  loss: (row, j) => (RUN().kind === "sft" ? derived(-logp(row, j)) : undefined),
  log_ratio: logRatio,
  running: (row, j) => (logRatio(row, j) === undefined ? undefined : runningSum(row, j)),
  reward: (row, j) => (RUN().kind === "ppo" ? value(row, "reward", j) : undefined),
  score: (row, j) => value(row, "value", j),
  change: (row, j) => (j > 0 && row.value !== undefined ? change(row, j) : undefined),
  ratio: (row, j) => ratio(row, j),
  clip: (row, j) => corner(row, j),
  w: (row, j) => value(row, "w", j) ?? RECORD().w ?? undefined,
};
const QUANTITIES = DATA.quantities.map((q) => ({ ...q, get: GET[q.key] || ((row, j) => value(row, q.key, j)) }));
const quantity = () => QUANTITIES.find((q) => q.key === state.quantity);

const available = (rows) =>
  QUANTITIES.filter(({ get }) => rows.some((row) => row.positions.some((_, j) => Number.isFinite(get(row, j)))));

// ---- colours: one scale over all rows of the step
function scaleOf(rows, { kind, get }) {
  const values = rows.flatMap((row) => row.positions.map((_, j) => get(row, j))).filter(Number.isFinite);
  const sizes = values.map((x) => Math.abs(kind === "ratio" ? Math.log(x) : x)).sort((a, b) => a - b);
  const most = sizes.at(-1) || 0, usual = sizes[Math.floor(0.98 * (sizes.length - 1))] || 0;
  const top = sizes.length > 50 && usual > 0 ? usual : most; // a few far out would leave all others pale
  return { kind, top: kind === "corner" ? 1 : top || 1, beyond: most > top };
}
const BLUE = "--blue", ORANGE = "--orange";
let palette = {}; // numbers, not var(): with that a change of 3,000 tokens takes five times as long
const shade = (colour, alpha) => `rgba(${palette[colour]}, ${alpha.toFixed(2)})`;
function paint(scale, x) {
  if (!Number.isFinite(x)) return "";
  const part = (scale.kind === "ratio" ? Math.log(x) : x) / scale.top;
  const twoSided = scale.kind !== "falling" && scale.kind !== "rising";
  return shade(twoSided && part > 0 ? ORANGE : BLUE, Math.min(1, Math.abs(part)) * 0.72);
}
function drawScale(scale) {
  const box = $("scale");
  const swatch = (colour, text) => [make("i", { class: "box", style: `background: ${colour}` }), make("span", { text })];
  const blue = shade(BLUE, 0.72), orange = shade(ORANGE, 0.72);
  if (scale.kind === "corner")
    return box.replaceChildren(...swatch(orange, "clipped above, A > 0"), ...swatch(blue, "clipped below, A < 0"),
      ...swatch("none", "not clipped"));
  const [low, high, colours] = {
    falling: [-scale.top, 0, [blue, "transparent"]],
    rising: [0, scale.top, ["transparent", blue]],
  }[scale.kind] || [-scale.top, scale.top, [blue, "transparent", orange]];
  const end = (x) => {
    const shown = number(Number((scale.kind === "ratio" ? Math.exp(x) : x).toPrecision(3)));
    return make("span", { text: shown + (scale.beyond && x !== 0 ? " or beyond" : "") });
  };
  box.replaceChildren(end(low), make("i", { style: `background: linear-gradient(to right, ${colours.join(", ")})` }), end(high));
}

// ---- curves
const HIDDEN = new Set(["step", "s", "tok_s", "lr", "rounds", "sampled", "limit"]);
const WIDTH = 300, HEIGHT = 150, LEFT = 44, BOTTOM = 18;

function axis(name, values) { // → {at: value → 0..1, ticks, log}. A KL has a line at each nat up to 10, above it the scale is logarithmic.
  let low = Math.min(...values), high = Math.max(...values);
  if (name.endsWith("kl") && high >= 2) {
    const squeeze = (x) => (x <= 10 ? x : 10 + 10 * Math.log10(x / 10));
    low = Math.min(low, 0);
    const nats = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50, 100, 200, 500].filter((x) => x <= high);
    const span = squeeze(high) - low;
    return { at: (x) => (squeeze(x) - low) / span, ticks: nats, log: high > 10, every: high > 5 ? 2 : 1 };
  }
  if (low > 0 && high / low > 100 && !name.endsWith("kl")) { // a KL begins at 1e-7: a log axis would show that alone
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    const ticks = Array.from({ length: to - from + 1 }, (_, k) => 10 ** (from + k));
    return { at: (x) => (Math.log10(x) - from) / (to - from), ticks, log: true, every: Math.ceil(ticks.length / 5) };
  }
  if (low === high) { low -= 0.5 * Math.abs(low); high += 0.5 * Math.abs(high) || 1; }
  const raw = (high - low) / 4;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((k) => k * unit >= raw);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-12; k++) ticks.push(Number((k * step).toPrecision(6)));
  return { at: (x) => (x - low) / (high - low), ticks, log: false, every: 1 };
}

function charts() {
  const measured = DATA.runs.flatMap((run) => run.columns.filter((name) => column(run, name).some((x) => x !== null)));
  $("charts").replaceChildren(...[...new Set(measured)].filter((name) => !HIDDEN.has(name)).map(chart));
  const legend = DATA.runs.map((run, i) =>
    make("span", {}, make("i", { style: `border-color: var(--run${i % 6}); border-top-style: ${dash(i)[0]}` }), run.name));
  $("legend").replaceChildren(...(DATA.runs.length > 1 ? legend : []));
}
const dash = (i) => [["solid", ""], ["dashed", "7 3"], ["dotted", "2 3"]][i % 3];
// A run that broke has tokens of the step that it broke in, and no metrics of it.
const lastStep = () => Math.max(1, ...DATA.runs.flatMap((run) => [column(run, "step").at(-1) || 0, run.records.at(-1)?.step || 0]));
const line = (points, i) => draw("polyline", { points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "),
  style: `stroke: var(--run${i % 6})`, "stroke-dasharray": dash(i)[1] });

function chart(name) {
  const all = DATA.runs.flatMap((run) => column(run, name)).filter((x) => x !== null);
  const scale = axis(name, all);
  const x = (step) => LEFT + (step / lastStep()) * (WIDTH - LEFT - 6);
  const y = (v) => HEIGHT - BOTTOM - scale.at(v) * (HEIGHT - BOTTOM - 8);
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
  scale.ticks.forEach((tick, i) => {
    svg.append(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - 6, y1: y(tick), y2: y(tick) }));
    if (i % scale.every === 0 || tick > 10)
      svg.append(draw("text", { x: LEFT - 4, y: y(tick) + 4, "text-anchor": "end", text: number(tick) }));
  });
  for (const step of [0, Math.round(lastStep() / 2), lastStep()]) {
    const anchor = step === 0 ? "start" : step === lastStep() ? "end" : "middle";
    svg.append(draw("text", { x: x(step), y: HEIGHT - 3, "text-anchor": anchor, text: String(step) }));
  }
  DATA.runs.forEach((run, i) => {
    const points = column(run, "step").map((step, k) => [step, column(run, name)[k]]).filter((p) => p[1] !== null && p[1] !== undefined);
    svg.append(line(points.map(([step, v]) => [x(step), y(v)]), i));
    if (points.length < 15) for (const [step, v] of points)
      svg.append(draw("circle", { cx: x(step), cy: y(v), r: 2.5, style: `fill: var(--run${i % 6})` }));
  });
  svg.append(draw("line", { class: "cursor", y1: 4, y2: HEIGHT - BOTTOM }));
  const title = make("b", { text: name + (scale.log ? " (log axis)" : "") });
  const figure = make("figure", { tabindex: 0, role: "img", "data-name": name }, make("figcaption", {}, title, make("span")), svg);
  figure.cursor = x;
  figure.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    goTo(((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - 6) * lastStep());
  });
  return figure;
}

function moveCursors() {
  const step = RECORD() ? RECORD().step : 0;
  for (const figure of document.querySelectorAll("figure")) {
    const name = figure.dataset.name, x = figure.cursor(step);
    build(figure.querySelector(".cursor"), { x1: x, x2: x }, []);
    const values = DATA.runs.map((run) => {
      const v = column(run, name)[column(run, "step").indexOf(step)];
      return v === undefined || v === null ? "–" : number(Number(v.toPrecision(4)));
    });
    figure.querySelector("span").textContent = values.join(" · ");
    figure.setAttribute("aria-label", `${name}, at step ${step}: ${values.join(", ")}`);
  }
}

function flags() {
  const configs = DATA.runs.map((run) => run.config);
  const names = [...new Set(configs.flatMap(Object.keys))];
  const text = (config, name) => (name in config ? JSON.stringify(config[name]) : "–");
  const differ = names.filter((name) => new Set(configs.map((config) => text(config, name))).size > 1);
  const many = configs.length > 1, listed = many ? differ : names;
  $("flags").querySelector("summary").textContent = many
    ? `${differ.length} flags differ: ${differ.map((name) => "--" + name).join(", ") || "none"}` : `the ${names.length} flags of the run`;
  const head = make("tr", {}, make("th", { text: "flag" }), ...DATA.runs.map((run) => make("th", { text: run.name })));
  const rows = listed.map((name) => make("tr", {}, make("td", { text: "--" + name }),
    ...configs.map((config) => make("td", { text: visible(text(config, name)) }))));
  $("flags").querySelector("table").replaceChildren(head, ...rows);
  $("flags").open = many;
}

// ---- responses
function prepare(rows) {
  for (const row of rows) {
    row.positions = [];
    row.j = row.ids.map((_, t) => (row.mask[t] === "1" ? row.positions.push(t) - 1 : -1));
  }
}
const tokenText = (text) => visible(text).replaceAll("\n", "↵\n").replaceAll("\t", "⇥");

function rowLabel(row, i) {
  const parts = [row.pair === undefined ? `row ${i}` : `pair ${row.pair}, ${row.side}`];
  if (row.group !== undefined) parts.push(`prompt ${row.group}`);
  if (row.score !== undefined) parts.push(`score ${number(row.score)}`);
  if (typeof row.adv === "number") parts.push(`A ${number(row.adv)}`);
  if (row.h !== undefined) parts.push(`h ${number(row.h)}`);
  parts.push(`${row.positions.length} tokens`);
  return parts.join(" · ");
}

function strips() {
  const rows = RECORD()?.rows || [];
  const longest = Math.max(0, ...rows.map((row) => row.ids.length));
  const shown = rows.map((row, i) => {
    const tokens = row.ids.map((id, t) => {
      const kind = row.j[t] < 0 ? " prompt" : row.finished && t === row.ids.length - 1 ? " eos" : "";
      const name = kind === " eos" ? "EOS" : tokenText(row.text[t]);
      return make("span", { class: "t" + kind, role: "button", tabindex: -1, "data-row": i, "data-t": t, text: name });
    });
    const strip = make("div", { class: "strip", role: "group", "aria-label": rowLabel(row, i) }, ...tokens);
    if (row.finished === false) strip.append(make("span", { class: "cut", text: "cut at the limit" }));
    if (longest > row.ids.length) strip.append(make("span", { class: "pad", text: `pad × ${longest - row.ids.length}` }));
    const other = i > 0 && ["group", "pair"].some((name) => row[name] !== rows[i - 1][name]);
    return make("div", { class: "row" + (other ? " other" : "") }, make("div", { class: "label", text: rowLabel(row, i) }), strip);
  });
  $("strips").replaceChildren(...shown);
  state.spans = rows.flatMap((row, i) => [...shown[i].querySelectorAll(".t")].map((span, t) => [span, row, row.j[t]]));
  if (!rows.length) $("strips").replaceChildren(make("p", { text: "This run has no tokens.jsonl.gz: it was run with --look_rows 0, or by an older version." }));
}

function colour() {
  const record = RECORD();
  if (!record || !quantity()) return;
  const style = getComputedStyle(document.documentElement);
  palette = Object.fromEntries([BLUE, ORANGE].map((name) => [name, style.getPropertyValue(name)]));
  const { get, meaning } = quantity(), scale = scaleOf(record.rows, quantity());
  for (const [span, row, j] of state.spans) {
    const x = j < 0 ? undefined : get(row, j);
    span.style.backgroundColor = paint(scale, x);
    span.classList.toggle("above", scale.kind === "corner" && x === 1);
    span.classList.toggle("below", scale.kind === "corner" && x === -1);
  }
  drawScale(scale);
  $("meaning").textContent = meaning + ". One scale over all rows of the step.";
  $("updates").hidden = !(record.rows[0] || {}).ratio;
}

function quantities() {
  const record = RECORD();
  const found = record ? available(record.rows) : [];
  const wanted = { ppo: "adv", grpo: "adv", dpo: "log_ratio", rm: "score", prm: "score", sft: "loss", distill: "divergence" }[RUN().kind];
  const has = (key) => found.some((q) => q.key === key);
  if (!has(state.quantity)) state.quantity = has(wanted) ? wanted : (found[0] || { key: "" }).key;
  $("quantity").replaceChildren(...found.map(({ key, name }) => make("option", { value: key, text: name })));
  $("quantity").value = state.quantity;
  const updates = (record && record.rows[0].ratio) || [];
  const names = updates.map((_, k) => [k, k ? `after update ${k} of the step` : "before the first update"]);
  names.unshift(["loss", "when its loss was computed"]);
  $("update").replaceChildren(...names.map(([key, text]) => make("option", { value: key, text })));
  if (Number(state.update) >= updates.length) state.update = "loss";
  $("update").value = state.update;
}

// ---- a token: its formulas with its own numbers
const link = (key, found = RUN().links[key]) => (found ? make("a", { href: found.href, text: found.text }) : "");

function formulas(row, j) {
  const run = RUN(), flags = run.config, lines = [];
  const get = (name, at = j) => value(row, name, at), add = (...formula) => lines.push(formula);
  const last = j === row.positions.length - 1, lp = logp(row, j), reference = refLogp(row, j), beta = RECORD().beta ?? flags.beta;
  if (lp !== undefined) add("log-prob", `log π = ${number(lp)}, probability ${number(derived(Math.exp(lp)))}`, "logp");
  if (get("entropy") !== undefined) add("entropy", `H = ${number(get("entropy"))} nats`, "logp");
  if (reference !== undefined) {
    add("log-ratio", `log π − log π_${run.kind === "distill" ? "teacher" : "ref"} = ${number(lp)} − ${term(reference)} = ${number(logRatio(row, j))}; summed up to here ${number(runningSum(row, j))}`, "log_ratio");
  }
  if (run.kind === "ppo") {
    const next = last ? 0 : get("old_value", j + 1), nextAdv = last ? 0 : get("adv_raw", j + 1);
    const score = row.finished || flags.no_eos_score === null ? row.score : flags.no_eos_score;
    const inReward = flags.kl === "exact" ? 0 : beta;
    const scaled = flags.whiten_rewards ? ", then divided by the rewards’ standard deviation," : "";
    add("reward", `r_t = −β · log-ratio + score = −${number(inReward)} · ${term(logRatio(row, j))} + ${last ? number(score) : 0}${scaled} = ${number(get("reward"))}`, "reward");
    add("value", `V_t = ${number(get("old_value"))}`, "value");
    add("surprise", `δ_t = r_t + γ V_{t+1} − V_t = ${number(get("reward"))} + ${number(flags.gamma)} · ${term(next)} − ${term(get("old_value"))} = ${number(get("delta"))}`, "delta");
    const explained = get("adv_raw") !== undefined; // a variant has other advantages, or a λ of the critic's own
    if (explained) add("advantage", `A_t = δ_t + γλ A_{t+1} = ${number(get("delta"))} + ${number(derived(flags.gamma * flags.lam))} · ${term(nextAdv)} = ${number(get("adv_raw"))}`, "adv");
    add("return", `R_t${explained ? ` = A_t + V_t = ${number(get("adv_raw"))} + ${term(get("old_value"))}` : ""} = ${number(get("ret"))}`, "ret");
    if (flags.whiten_advantages) add("whitened", `A_t less the mean of the rollout, divided by its standard deviation = ${number(get("adv"))}`, "whiten");
  }
  if (run.kind === "grpo") groupFormulas(row, add, j);
  if (row.ratio) {
    const rho = ratio(row, j), range = clipRange(run), A = get("adv");
    const when = state.update === "loss" ? `when its loss was computed, ${$("update").options[(row.update || [])[0] + 1]?.textContent}` : $("update").selectedOptions[0].textContent;
    const of = flags.ratio === "sequence" ? "ρ = (Π π / π_old)^(1/n), of the whole row," : "ρ_t = π / π_old";
    if (rho !== undefined) add(`ratio, ${when}`, `${of} = ${number(rho)}`, "ratio");
    if (range && A !== undefined && rho !== undefined) {
      const clipped = Math.min(Math.max(rho, range[0]), range[1]);
      const free = derived(-A * rho), held = derived(-A * clipped);
      const which = ["ratio as it is", "clipped above: no gradient", "clipped below: no gradient"][[0, 1, -1].indexOf(corner(row, j))];
      add("loss of the token", `max(−A ρ, −A clip(ρ, ${number(derived(range[0]))}, ${number(derived(range[1]))})) = max(${number(free)}, ${number(held)}) = ${number(Math.max(free, held))}; ${which}`, "surrogate");
    }
    if (run.kind === "grpo" && flags.kl === "k3" && flags.kl_in === "loss" && reference !== undefined)
      add("KL estimate k3, at π_old", `e^d − 1 − d with d = log π_ref − log π = ${number(-logRatio(row, j))}: ${number(derived(Math.expm1(-logRatio(row, j)) + logRatio(row, j)))}, times β = ${number(beta)}`, "k3");
  }
  if (run.kind === "distill") {
    add("divergence, the loss", `D(p, q) = ${number(get("divergence"))}`, "divergence");
    add("KL(student‖teacher)", number(get("kl")), "kl");
  }
  if (run.kind === "sft") add("loss", `−log π = ${number(derived(-lp))}`, "sft_loss");
  if (row.value !== undefined) {
    add("score if the response ended here", number(get("value")), "score");
    if (j > 0) add("change by this token", `${number(get("value"))} − ${term(get("value", j - 1))} = ${number(change(row, j))}`, "score");
  }
  if (row.h !== undefined) pairFormulas(row, add);
  const weight = get("w") ?? RECORD().w;
  if (weight !== undefined && weight !== null) add("weight in the loss", `w_t = ${number(weight)}, one in ${number(Math.round(1 / weight))}`, "w");
  return lines;
}

function moments(values) {
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const mean = sum(values) / values.length;
  return [mean, Math.sqrt(sum(values.map((x) => (x - mean) ** 2)) / Math.max(1, values.length - 1))];
}

function groupFormulas(row, add, j) {
  const groups = RECORD().groups || {}, flags = RUN().config;
  const A = number(value(row, "adv", j));
  if (!groups.reward || !groups.adv) return add("advantage", `A_t = ${A}`, "adv"); // of a variant, for each token
  const rewards = groups.reward.filter((_, i) => groups.group[i] === row.group);
  const [mean, std] = moments(rewards).map(derived);
  const top = `${number(row.reward)} − ${term(mean)}`;
  const text = {
    group_std: `(r − mean) / (std + eps) = (${top}) / (${number(std)} + ${number(flags.std_eps)}) = ${A}`,
    none: `r − mean = ${top} = ${A}`,
    leave_one_out: `G/(G−1) · (r − mean) = ${rewards.length}/${rewards.length - 1} · (${top}) = ${A}`,
    batch_std: `(r − mean) / std of the batch = (${top}) / std = ${A}`,
    batch_whiten: `r − mean = ${top}, whitened over the batch = ${A}`,
  }[flags.norm];
  if (row.reward !== row.score) add("reward of the response", `score ${number(row.score)} with its penalties = ${number(row.reward)}`, "reward");
  add("advantage, of the whole response", `A = ${text}`, "adv");
}

function pairFormulas(row, add) {
  const flags = RUN().config;
  add("of the whole response", `h = Σ log π − log π_ref = ${number(row.h)}`, "h");
  if (withoutReference()) return add("of its tokens", `mean of log π = ${number(meanLogp(row))}`, "logp");
  if (flags.loss === "kto") return add("z₀, what h is held against", number(RECORD().z0));
  const other = RECORD().rows.find((r) => r.pair === row.pair && r.side !== row.side);
  if (!other) return;
  const [w, l] = row.side === "chosen" ? [row.h, other.h] : [other.h, row.h];
  const margin = derived(flags.beta * (w - l));
  add("of the pair", `β (h_w − h_l) = ${number(flags.beta)} · (${number(w)} − ${term(l)}) = ${number(margin)}`, "margin");
  if (flags.loss === "dpo" && !flags.label_smoothing)
    add("loss of the pair", `−log σ(${number(margin)}) = ${number(derived(Math.log1p(Math.exp(-margin))))}`, "pair_loss");
}

function choose(i, t, focus = false) {
  const rows = RECORD() ? RECORD().rows : [];
  if (!rows.length) return $("token").replaceChildren();
  state.row = Math.max(0, Math.min(i, rows.length - 1));
  const row = rows[state.row];
  state.token = Math.max(0, Math.min(t, row.ids.length - 1));
  for (const old of $("strips").querySelectorAll(".chosen, .current, [tabindex='0']")) {
    old.classList.remove("chosen", "current");
    if (old.matches(".t")) old.tabIndex = -1;
  }
  const strip = $("strips").children[state.row];
  strip.classList.add("current");
  const span = strip.querySelectorAll(".t")[state.token];
  span.classList.add("chosen");
  span.tabIndex = 0;
  if (focus) span.focus();
  const j = row.j[state.token];
  const kind = j < 0 ? "prompt, not trained on" : span.classList.contains("eos") ? "EOS, which ended the response" : `token ${j + 1} of ${row.positions.length}`;
  const title = make("h3", {}, make("code", { text: visible(row.text[state.token]) }), ` id ${row.ids[state.token]} · row ${state.row} · ${kind}`);
  const list = make("dl");
  for (const [name, text, key] of j < 0 ? [] : formulas(row, j))
    list.append(make("dt", { text: name }), make("dd", {}, text + " ", link(key)));
  $("token").replaceChildren(title, list);
}

// ---- groups, pairs, scores
function section(title, hint, list) {
  $("groups").hidden = !list.length;
  $("groups").querySelector("h2").textContent = title;
  $("groups").querySelector("p").textContent = hint;
  $("groups").querySelector(".list").replaceChildren(...list);
}

function groups() {
  const record = RECORD(), kind = RUN().kind;
  if (!record) return section("", "", []);
  if (kind === "dpo") return pairs(record.rows);
  if (kind === "rm") return scores(record.rows);
  if (kind !== "grpo" || !record.groups || !record.groups.reward) return section("", "", []);
  const { group, reward, adv } = record.groups;
  const low = Math.min(...reward), high = Math.max(...reward, low + 1e-9), norm = RUN().config.norm;
  const numbers = [...new Set(group)].slice(0, 24);
  section("Groups", `The rewards of each prompt’s responses, their mean and spread, and the advantages under --norm ${norm}. A dead group, grey, has equal rewards: it teaches nothing. ${numbers.length} of ${new Set(group).size} prompts.`,
    numbers.map((g) => {
      const mine = reward.map((r, i) => [r, adv ? adv[i] : null]).filter((_, i) => group[i] === g);
      const [mean, std] = moments(mine.map((pair) => pair[0]));
      const dead = mine.every((pair) => pair[0] === mine[0][0]);
      const x = (r) => 12 + (r - low) / (high - low) * 276;
      const svg = draw("svg", { viewBox: "0 0 300 64", role: "img", "aria-label": `prompt ${g}: mean ${short(derived(mean))}` });
      svg.append(draw("line", { class: "grid", x1: 12, x2: 288, y1: 52, y2: 52 }));
      const from = Math.max(low, mean - std), to = Math.min(high, mean + std);
      svg.append(draw("rect", { x: x(from), width: x(to) - x(from), y: 48, height: 8, style: "fill: rgba(var(--blue), 0.3)" }));
      const seen = {}, colour = (r) => (dead ? "var(--faint)" : `rgb(var(${r > mean ? ORANGE : BLUE}))`);
      for (const [r] of mine) { // equal rewards stand in rows of eight, inwards from their value
        const k = (seen[r] = (seen[r] ?? -1) + 1);
        const inwards = r > (low + high) / 2 ? -8 : 8;
        svg.append(draw("circle", { cx: x(r) + inwards * (k % 8), cy: 40 - 8 * Math.floor(k / 8), r: 3.4, style: `fill: ${colour(r)}` }));
      }
      svg.append(draw("line", { x1: x(mean), x2: x(mean), y1: 44, y2: 60, style: "stroke: var(--text); stroke-width: 2" }));
      const distinct = [...new Set(mine.map(([r, A]) => `${number(r)} → ${number(A)}`))];
      const text = dead ? `prompt ${g}: dead, all ${mine.length} rewards are ${number(mine[0][0])}`
        : `prompt ${g}: mean ${number(derived(mean))}, spread ${number(derived(std))}; reward → advantage: ${distinct.slice(0, 6).join(", ")}${distinct.length > 6 ? ", …" : ""}`;
      return make("div", { class: "group" + (dead ? " dead" : "") }, svg, make("p", { text }));
    }));
}

// SimPO and ORPO: their loss knows no reference, and takes the mean over the tokens.
const withoutReference = () => ["simpo", "orpo"].includes(RUN().config.loss);
const meanLogp = (row) => derived(row.positions.reduce((sum, _, j) => sum + logp(row, j), 0) / row.positions.length);

function pairs(rows) {
  const { beta, loss } = RUN().config;
  const chosen = rows.filter((row) => row.side === "chosen"), likes = { chosen: "liked", rejected: "disliked" };
  const rejected = (w) => rows.find((row) => row.pair === w.pair && row.side === "rejected");
  const list = (all, text) => all.map((row) => make("p", { text: text(row) }));
  if (loss === "kto") return section("Responses, liked and disliked", `KTO holds h of each against z₀ = ${number(RECORD().z0)}.`,
    list(rows, (row) => `response ${row.pair}, ${likes[row.side]}: h ${number(row.h)}`));
  if (withoutReference()) return section("Pairs", "This loss compares the means of log π over the tokens of each response, without a reference.",
    list(chosen.filter(rejected), (w) => `pair ${w.pair}: chosen ${number(meanLogp(w))}, rejected ${number(meanLogp(rejected(w)))}`));
  section("Pairs", "Where the margin β (h_w − h_l) of each pair comes from: the tokens that move it most. Both strips stand above, under “log-ratio to the reference”.",
    chosen.filter(rejected).map((w) => {
      const l = rejected(w);
      const parts = [[w, 1, "chosen"], [l, -1, "rejected"]].flatMap(([row, side, name]) =>
        row.positions.map((t, j) => [side * logRatio(row, j), row.text[t], name])).filter(([x]) => Number.isFinite(x));
      parts.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
      const most = parts.slice(0, 4).map(([x, text, name]) => `“${visible(text).replaceAll(" ", "␣")}” (${name}) ${number(derived(beta * x))}`);
      return make("p", { text: `pair ${w.pair}: h_w ${number(w.h)}, h_l ${number(l.h)}, margin ${number(derived(beta * (w.h - l.h)))}. Most of it: ${most.join(", ")}` });
    }));
}

function scores(rows) {
  const values = rows.flatMap((row) => row.value).filter(Number.isFinite);
  const low = Math.min(...values), high = Math.max(...values, low + 1e-9);
  section("The score as it grows", "What the reward model would say if the response ended at each token. Blue, solid: chosen; orange, dashed: rejected. Only the last one is trained on.",
    [...new Set(rows.map((row) => row.pair))].map((pair) => {
      const svg = draw("svg", { viewBox: "0 0 300 90", role: "img", "aria-label": `pair ${pair}` });
      const y = (v) => 84 - (v - low) / (high - low) * 78;
      for (const v of [low, high]) svg.append(draw("text", { x: 36, y: y(v) + (v === low ? 0 : 6), "text-anchor": "end", text: number(Number(v.toPrecision(3))) }));
      if (low < 0 && high > 0) svg.append(draw("line", { class: "grid", x1: 40, x2: 296, y1: y(0), y2: y(0) }));
      const both = rows.filter((row) => row.pair === pair);
      const longest = Math.max(...both.map((row) => row.positions.length));
      both.forEach((row, i) => {
        svg.append(line(row.positions.map((_, j) => [40 + j / Math.max(1, longest - 1) * 256, y(value(row, "value", j))]).filter((point) => point.every(Number.isFinite)), i));
      });
      const text = both.map((row) => `${row.side} ${number(row.score)}`).join(", ");
      const order = both.length > 1 ? (both[0].score > both[1].score ? " in order" : " in the wrong order") : "";
      return make("div", { class: "group" }, svg, make("p", { text: `pair ${pair}: ${text};${order}` }));
    }));
}

// ---- before and after, findings
function answersCard(prompt, sides) {
  const shown = sides.map(([who, answer]) => make("div", {},
    make("div", { class: "who", text: who + (answer.reward === undefined || answer.reward === null ? "" : ` · score ${number(answer.reward)}`) }),
    make("div", { class: "text", text: visible(answer.response) })));
  return make("div", { class: "answers" }, make("div", { class: "prompt", text: visible(prompt) }), make("div", { class: "sides" }, ...shown));
}

function beforeAfter() {
  const run = RUN();
  let cards = DATA.demo.map((row) => answersCard(row.prompt, row.answers));
  cards = cards.concat(run.before_after.map((row) => {
    const sides = [[`step ${row.before.step}`, row.before], [`step ${row.after.step}`, row.after]];
    if (row.before.step === row.after.step && row.before.response === row.after.response) sides.shift();
    for (const other of DATA.runs) {
      const same = other === run ? null : other.before_after.find((theirs) => theirs.prompt === row.prompt);
      if (same) sides.push([`${other.name}, step ${same.after.step}`, same.after]);
    }
    return answersCard(row.prompt, sides);
  }));
  $("before-after").hidden = !cards.length;
  const same = { rm: "responses, of a pair the chosen one first, scored", prm: "responses, scored" }[run.kind] || "prompts, answered";
  $("before-after").querySelector(".hint").textContent = `The same held-out ${same} at the first logged step and at the last.`;
  $("before-after").querySelector(".list").replaceChildren(...cards);
}

function findings() {
  const found = RUN().findings.map((f) => make("div", { class: "finding" },
    make("b", { text: f.title }), make("p", { class: "hint", text: f.steps }), make("p", { text: f.meaning }), make("p", { text: f.remedy }),
    f.href ? make("a", { href: f.href, text: f.page }) : ""));
  $("findings").querySelector(".list").replaceChildren(...(found.length ? found : [make("p", { text: "Nothing was found." })]));
}

// ---- moving about
function show(step) {
  state.step = Math.max(0, Math.min(step, RUN().records.length - 1));
  const record = RECORD();
  $("step-name").textContent = record ? `${record.step} (${state.step + 1} of ${RUN().records.length})` : "none";
  $("step").value = state.step;
  $("step").setAttribute("aria-valuetext", record ? `step ${record.step}` : "none");
  $("back").disabled = state.step === 0;
  $("next").disabled = state.step >= RUN().records.length - 1;
  moveCursors();
  quantities();
  strips();
  colour();
  groups();
  choose(state.row, state.token < 0 && record ? record.rows[0].mask.indexOf("1") : state.token);
}

function goTo(step) {
  const far = RUN().records.map((record) => Math.abs(record.step - step));
  show(step === Infinity ? step : far.indexOf(Math.min(...far)));
}

function showRun(at = Infinity) { // the step, not its place in the list: runs log other steps
  const run = RUN();
  document.title = `${run.name} · nanoRLHF`;
  $("title").textContent = DATA.runs.length > 1 ? `${DATA.runs.length} runs` : run.name;
  $("about").textContent = `${run.trainer} · ${run.about}`;
  $("step").max = Math.max(0, run.records.length - 1);
  $("left-out").textContent = run.left_out;
  goTo(at);
  beforeAfter();
  findings();
}

function keys(event) {
  const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key], down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.altKey || event.ctrlKey || event.metaKey || (!side && !down)) return;
  const inStrip = event.target.closest(".t");
  if (event.target.matches("select, input")) return;
  if (inStrip && side && !event.shiftKey) choose(state.row, state.token + side, true);
  else if (inStrip && down) choose(state.row + down, state.token, true);
  else if (side) {
    show(state.step + side);
    if (inStrip) choose(state.row, state.token, true);
  } else return;
  event.preventDefault();
}

function begin() {
  for (const run of DATA.runs) for (const record of run.records) prepare(record.rows);
  $("run").replaceChildren(...DATA.runs.map((run, i) => make("option", { value: i, text: run.name })));
  $("runs").hidden = DATA.runs.length < 2;
  charts();
  flags();
  showRun();
  $("run").addEventListener("change", () => { const at = RECORD()?.step; state.run = Number($("run").value); showRun(at); });
  $("step").addEventListener("input", () => show(Number($("step").value)));
  $("back").addEventListener("click", () => show(state.step - 1));
  $("next").addEventListener("click", () => show(state.step + 1));
  $("quantity").addEventListener("change", () => { state.quantity = $("quantity").value; colour(); });
  $("update").addEventListener("change", () => { state.update = $("update").value; colour(); choose(state.row, state.token); });
  const point = (event) => {
    const span = event.target.closest(".t"), click = event.type === "click";
    if (!span || (state.pinned && event.type === "mouseover")) return;
    if (click) state.pinned = state.pinned === span ? null : span; // a second click lets go of it
    choose(Number(span.dataset.row), Number(span.dataset.t), click);
  };
  for (const kind of ["mouseover", "click", "focusin"]) $("strips").addEventListener(kind, point);
  document.addEventListener("keydown", keys);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colour);
}
begin();
