// The interactive support matrix: shows exported answers of kernelry.explain, and decides nothing itself.
// docs/site/matrix.py writes matrix.json.

import { Matrix, joined, thousands } from "./matrix-answers.js";

const STATES = ["could serve", "passed over", "refuses", "made for other platforms"];
const PASSED_OVER = 1;
const ELSEWHERE = 3;
const GROUPS = {
  heads: "Heads and head dims",
  dtype: "Dtype",
  storage: "Keys and values",
};
const PLAIN = { dtype: "bfloat16", storage: "arrays" };
const SOURCES = /\b(not measured|measured|predicted|published)\b/;

/** Makes an element; attributes that are null or false are left out, `on…` are listeners. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const code = (text) => make("code", {}, ...breakable(text));

/** Names may break after an underscore. */
function breakable(text) {
  return text.split(/(?<=_)/).flatMap((part, place) => (place ? [make("wbr"), part] : [part]));
}


/** The controls, and the answer below them. */
class Page {
  constructor(matrix, root) {
    this.matrix = matrix;
    this.choice = matrix.read(location.search);
    this.controls = new Map();
    this.status = make("p", { class: "matrix-status", role: "status", "aria-live": "polite" });
    this.result = make("div", { class: "matrix-result" });
    root.replaceChildren(this.form(), this.status, this.result, this.about());
    this.show();
  }

  form() {
    const { data } = this.matrix;
    const pairs = (names) => names.map((name) => [name, name]);
    const masks = data.masks.map((mask) => [mask.name, mask.label]);
    const lengths = data.lengths.map((length) => [length, thousands(length)]);
    const models = [["", "none"], ...pairs(data.models.map((model) => model.name))];
    const caches = data.caches.map(({ name, label }) => [name, label]);
    const where = make(
      "fieldset", {}, make("legend", {}, "Where and what"),
      this.select("target", "Target", pairs(data.targets)),
      this.select("mode", "Mode", pairs(data.modes)),
      this.select("length", "Length (tokens)", lengths, Number),
      this.select("model", "Model", models),
      this.select("cache", "Cache", caches),
    );
    this.request = make(
      "fieldset", {}, make("legend", {}, "Request"),
      this.select("mask", "Mask", masks),
      Object.entries(GROUPS).map(([group, label]) => this.group(group, label)),
      make("div", { class: "matrix-features", role: "group", "aria-label": "Features" }, this.features()),
    );
    return make(
      "form", { class: "matrix-form", onsubmit: (event) => event.preventDefault() }, where, this.request,
      make("button", { type: "button", class: "matrix-button", onclick: () => this.change(this.matrix.defaults) }, "Reset"),
    );
  }

  labelled(id, label, control) {
    return make("div", { class: "matrix-control" }, make("label", { for: id }, label), control);
  }

  select(name, label, pairs, parse = String) {
    const options = pairs.map(([value, text]) => make("option", { value }, text));
    const onchange = (event) => this.change({ [name]: parse(event.target.value) });
    const control = make("select", { id: `matrix-${name}`, name, onchange }, options);
    this.controls.set(name, control);
    return this.labelled(control.id, label, control);
  }

  /** Options of which one is chosen: "" is the plain one. */
  group(group, label) {
    const { data, options } = this.matrix;
    const own = data.options.filter((option) => option.group === group);
    const all = [["", PLAIN[group] ?? data.plain_heads.label], ...own.map((option) => [option.name, option.label])];
    const onchange = (event) => {
      const others = this.choice.with.filter((name) => options.get(name).group !== group);
      this.change({ with: event.target.value ? [...others, event.target.value] : others });
    };
    const elements = all.map(([value, text]) => make("option", { value }, text));
    const control = make("select", { id: `matrix-${group}`, name: group, onchange }, elements);
    this.controls.set(group, control);
    return this.labelled(control.id, label, control);
  }

  features() {
    const own = this.matrix.data.options.filter((option) => option.group === "feature");
    return own.map(({ name, label }) => {
      const onchange = (event) => {
        const others = this.choice.with.filter((other) => other !== name);
        this.change({ with: event.target.checked ? [...others, name] : others });
      };
      const box = make("input", { type: "checkbox", id: `matrix-${name}`, name, onchange });
      this.controls.set(name, box);
      return make("label", { for: box.id }, box, " ", label);
    });
  }

  change(change) {
    this.choice = { ...this.choice, ...change };
    history.replaceState(null, "", location.pathname + this.matrix.written(this.choice) + location.hash);
    this.show();
  }

  /** Sets the controls to the choice, and shows its answer. */
  show() {
    const { choice, matrix } = this;
    for (const name of ["target", "mode", "length", "mask", "model", "cache"]) {
      this.controls.get(name).value = choice[name];
    }
    for (const group of Object.keys(GROUPS)) {
      this.controls.get(group).value = choice.with.find((name) => matrix.options.get(name).group === group) ?? "";
    }
    for (const { name, group } of matrix.data.options) {
      if (group === "feature") this.controls.get(name).checked = choice.with.includes(name);
    }
    this.request.hidden = this.controls.get("mode").parentElement.hidden = Boolean(choice.model);
    this.controls.get("cache").parentElement.hidden = !choice.model;
    const [said, ...parts] = choice.model ? this.ofModel() : this.ofRequest();
    this.status.textContent = said;
    this.result.replaceChildren(...parts);
  }

  ofRequest() {
    const { choice, matrix } = this;
    const impossible = matrix.notOffered(choice);
    if (impossible.length) return [impossible.join(" "), this.instead()];
    const number = matrix.cell(choice);
    if (number === undefined) {
      const said = "Not exported: this page has no answer to this combination. The command below computes it.";
      return [said, this.instead(), this.command()];
    }
    const answer = matrix.answer(number);
    return [told(answer), ...explained(answer, matrix), this.command()];
  }

  instead() {
    const found = this.matrix.nearest(this.choice);
    const buttons = found.map(([label, change]) =>
      make("button", { type: "button", class: "matrix-button", onclick: () => this.change(change) }, label));
    return make("div", {}, found.length ? make("p", {}, "With one change there is an answer:") : null, buttons);
  }

  ofModel() {
    const { choice, matrix } = this;
    const rows = matrix.rows(choice);
    if (!rows) {
      const lengths = joined(matrix.data.model_lengths.map(thousands));
      const said = `Not exported: models are resolved for ${lengths} tokens. The command below computes this one.`;
      return [said, this.command()];
    }
    const model = matrix.models.get(choice.model);
    const kernels = [...new Set(rows.map((row) => row.answer.winner?.kernel ?? "no kernel"))];
    const bodies = model.kinds.map((kind) => make(
      "tbody", {},
      make("tr", {}, make("th", { colspan: 2, scope: "rowgroup" }, kind.text, ...remarks(kind.remarks))),
      rows.filter((row) => row.kind === kind.name).map((row) => make(
        "tr", {}, make("th", { scope: "row" }, row.call),
        make("td", {}, make("details", {}, make("summary", {}, ...winnerOf(row.answer)), ...explained(row.answer, matrix))),
      )),
    ));
    const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "phase"), make("th", { scope: "col" }, "kernel")));
    const table = make("table", { class: "matrix-model" }, make("caption", {}, model.headline), head, bodies);
    return [`${choice.model} on ${choice.target}: ${kernels.join(", ")}.`, table, ...remarks(model.others), this.command()];
  }

  command() {
    const text = this.matrix.command(this.choice);
    const done = make("span", { class: "matrix-done", role: "status" });
    const copy = async () => {
      await navigator.clipboard.writeText(text);
      done.textContent = "copied";
    };
    return make(
      "div", { class: "matrix-command" }, make("h3", {}, "The same by command"), make("pre", {}, make("code", {}, ...together(text))),
      make("button", { type: "button", class: "matrix-button", onclick: copy }, "Copy"), " ", done,
    );
  }

  about() {
    const { versions, left_out: leftOut } = this.matrix.data;
    const by = Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ");
    return make(
      "details", { class: "matrix-about" }, make("summary", {}, "What is not here, and what is assumed"),
      make("p", {}, `Resolved by ${by}; every library that this Python can have is assumed to be installed on every target. Not exported:`),
      make("ul", {}, leftOut.map((text) => make("li", {}, text))),
    );
  }
}

const remarks = (texts) => (texts.length ? [make("ul", { class: "matrix-remarks" }, texts.map((text) => make("li", {}, text)))] : []);

/** A command whose lines break between its options only. */
function together(text) {
  const parts = text.split(/ (?=--)/);
  return parts.flatMap((part, place) => {
    const own = part.length < 40 ? make("span", { class: "matrix-option" }, part) : part;
    return place ? [" ", own] : [own];
  });
}

/** An answer in one sentence. */
function told({ winner }) {
  if (!winner) return "No kernel serves this request.";
  const through = winner.steps.map(([name]) => name);
  return `${winner.kernel} serves it${through.length ? `, through ${joined(through)}` : " as it is"}.`;
}

function winnerOf({ winner }) {
  if (!winner) return ["no kernel"];
  return [code(winner.kernel), ...winner.steps.flatMap(([name]) => [" + ", code(name)])];
}

/** An answer in full: the winner, the rule, and the kernels that were not chosen. */
function explained({ winner, rule, losers, advice }, matrix) {
  const facts = [];
  const fact = (name, ...values) => facts.push(make("div", {}, make("dt", {}, name), make("dd", {}, ...values)));
  if (winner) {
    const { distribution, summary } = matrix.data.kernels[winner.kernel];
    fact("Kernel", make("strong", { class: "matrix-winner" }, code(winner.kernel)), make("br"), summary, ` (${distribution})`);
    const steps = winner.steps.map(([name, cost]) => make("li", {}, code(name), ` ${cost}`));
    fact("Adapters", steps.length ? make("ul", { class: "matrix-adapters" }, steps) : "none");
    if (winner.together) fact("Together", winner.together);
    if (winner.tiling) fact("Tiling", ...breakable(winner.tiling), winner.source ? ` (${winner.source})` : "");
  }
  const source = SOURCES.exec(rule);
  fact("Decided by", source ? make("span", { class: "matrix-source" }, source[0]) : null, source ? " " : null, ...breakable(rule));
  for (const note of winner?.notes ?? []) fact("Note", note);
  const here = losers.filter((loser) => loser.state !== ELSEWHERE);
  const elsewhere = losers.filter((loser) => loser.state === ELSEWHERE);
  const others = elsewhere.length
    ? [make("details", { class: "matrix-elsewhere" }, make("summary", {}, `${elsewhere.length} kernels ${STATES[ELSEWHERE]}`), elsewhere.map(loserOf))]
    : [];
  const why = losers.length ? [make("h3", {}, "Why not the others")] : [];
  return [make("dl", { class: "matrix-facts" }, facts), ...(advice ? [make("p", {}, advice)] : []), ...why, ...here.map(loserOf), ...others];
}

function loserOf({ name, state, lines }) {
  const more = lines.length > 1 ? ` (+${lines.length - 1})` : "";
  const said = state === PASSED_OVER ? `${STATES[state]}${more}` : `${lines[0]}${more}`;
  const attributes = { class: `matrix-other matrix-state-${state}`, "data-kernel": name };
  const line = [code(name), " ", make("span", {}, ...breakable(said))];
  if (said === lines[0]) return make("div", attributes, ...line);
  return make(
    "details", attributes,
    make("summary", {}, ...line),
    make("ul", {}, lines.map((line) => make("li", {}, ...breakable(line)))),
  );
}

const root = document.getElementById("matrix");
try {
  const response = await fetch(new URL("matrix.json", import.meta.url));
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  new Page(new Matrix(await response.json()), root);
} catch (error) {
  root.replaceChildren(make("p", { role: "alert" }, `The answers could not be loaded (${error.message}). The page must be served over HTTP.`));
  throw error;
}
