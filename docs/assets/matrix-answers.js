// The answers that docs/site/matrix.py exported from kernelry.explain: which can be chosen, what each says, and the command
// that asks the same. Nothing here decides anything.

export const joined = (names) => new Intl.ListFormat("en-GB").format(names);
export const thousands = (number) => number.toLocaleString("en-US");
const quoted = (text) => (/^[\w().,-]+$/.test(text) && !/[()]/.test(text) ? text : `"${text}"`);

/** The exported answers, and what can be chosen. */
export class Matrix {
  constructor(data) {
    this.data = data;
    this.options = new Map(data.options.map((option) => [option.name, option]));
    this.masks = new Map(data.masks.map((mask) => [mask.name, mask]));
    this.models = new Map(data.models.map((model) => [model.name, model]));
    this.blocks = new Map(data.grid.map((block) => [this.key(block.mode, block.options), block]));
    this.defaults = {
      target: "gpu:h100", mode: "train", length: 8192, mask: "causal", model: "", cache: data.caches[0].name, with: [],
    };
  }

  key(mode, options) {
    return [mode, ...[...options].sort()].join(" ");
  }

  expression(mask, mode) {
    const found = this.masks.get(mask);
    return mode === "decode" ? found.step : found.whole;
  }

  /** Why a choice cannot be asked in its mode; nothing where it can. */
  notOffered(choice) {
    const reasons = [];
    if (this.expression(choice.mask, choice.mode) === null) {
      reasons.push(`The mask “${this.masks.get(choice.mask).label}” is not offered in ${choice.mode}.`);
    }
    for (const name of choice.with) {
      const { label, modes } = this.options.get(name);
      if (!modes.includes(choice.mode)) reasons.push(`“${label}” is offered in ${joined(modes)} only.`);
    }
    return reasons;
  }

  /** The number of the answer to a request; undefined where it was not exported. */
  cell(choice) {
    const block = this.blocks.get(this.key(choice.mode, choice.with));
    if (!block) return undefined;
    const target = this.data.targets.indexOf(choice.target);
    const mask = block.masks.indexOf(choice.mask);
    const length = block.lengths.indexOf(choice.length);
    if (Math.min(target, mask, length) < 0) return undefined;
    return block.cells[(target * block.masks.length + mask) * block.lengths.length + length];
  }

  /** Choices that differ in one thing and were exported, with what is different. */
  nearest(choice) {
    const found = [];
    const consider = (change, label) => {
      const other = { ...choice, ...change };
      if (!this.notOffered(other).length && this.cell(other) !== undefined) found.push([label, change]);
    };
    for (const name of choice.with) {
      consider({ with: choice.with.filter((other) => other !== name) }, `without ${this.options.get(name).label}`);
    }
    for (const length of this.data.lengths) consider({ length }, `${thousands(length)} tokens`);
    for (const { name, label } of this.data.masks) consider({ mask: name }, `mask ${label}`);
    for (const mode of this.data.modes) consider({ mode }, mode);
    if (!found.length) consider({ with: [] }, "none of these options");
    return found;
  }

  /** The rows of a model's table: the kind of layers, the phase, the number of the answer. */
  rows(choice) {
    const length = this.data.model_lengths.indexOf(choice.length);
    if (length < 0) return undefined;
    const place = this.data.targets.indexOf(choice.target) * this.data.model_lengths.length + length;
    const rows = this.models.get(choice.model).rows[choice.cache];
    return rows.map(([kind, call, cells]) => ({ kind, call, answer: this.answer(cells[place]) }));
  }

  /** An answer with its texts. */
  answer(number) {
    const { answers, plans, others, candidates, lines } = this.data;
    const [rule, plan, list, advice] = answers[number];
    const line = (index) => lines[index];
    let winner = null;
    if (plan >= 0) {
      const [kernel, tiling, source, together, adapters, notes] = plans[plan];
      const steps = [];
      for (let place = 0; place < adapters.length; place += 2) steps.push([adapters[place], adapters[place + 1]]);
      winner = { kernel, tiling, source, together, steps, notes: notes.map(line) };
    }
    const losers = others[list].map((index) => {
      const [name, state, ...texts] = candidates[index];
      return { name, state, lines: texts.map(line) };
    });
    return { rule: line(rule), winner, losers, advice: advice < 0 ? null : line(advice) };
  }

  /** The commands that ask the same. */
  command(choice) {
    const target = `--target ${choice.target}`;
    if (choice.model) {
      const { arguments: stored } = this.data.caches.find((cache) => cache.name === choice.cache);
      return ["kernelry explain --model", choice.model, target, "--q-len", choice.length, stored].join(" ").trim();
    }
    const options = choice.with.map((name) => this.options.get(name));
    const heads = options.find((option) => option.group === "heads") ?? this.data.plain_heads;
    const rest = options.filter((option) => option.group !== "heads");
    const config = rest.map((option) => option.config).filter(Boolean);
    const sizes = choice.mode === "decode" ? `--q-len 1 --kv-len ${choice.length}` : `--q-len ${choice.length}`;
    const parts = [
      "kernelry explain", config.length ? "--config layer.toml" : "", target, `--mode ${choice.mode}`, sizes,
      heads.arguments, `--mask ${quoted(this.expression(choice.mask, choice.mode))}`,
      ...rest.map((option) => option.arguments),
    ];
    const asked = parts.filter(Boolean).join(" ");
    const file = ["[attention]", ...config].map((text) => `'${text}'`).join(" ");
    return config.length ? `printf '%s\\n' ${file} > layer.toml\n${asked}` : asked;
  }

  /** A choice from the page's address; what cannot be read is left at its default. */
  read(search) {
    const given = new URLSearchParams(search);
    const choice = { ...this.defaults };
    const known = {
      target: this.data.targets, mode: this.data.modes, mask: [...this.masks.keys()], model: [...this.models.keys()],
      cache: this.data.caches.map((cache) => cache.name),
    };
    for (const [name, values] of Object.entries(known)) {
      if (values.includes(given.get(name))) choice[name] = given.get(name);
    }
    const length = Number(given.get("length"));
    if (this.data.lengths.includes(length)) choice.length = length;
    const names = (given.get("with") ?? "").split(",").filter((name) => this.options.has(name));
    const taken = new Set();
    choice.with = names.filter((name) => {
      const { group } = this.options.get(name);
      const again = group !== "feature" && taken.has(group);
      taken.add(group);
      return !again;
    });
    return choice;
  }

  /** The part of the page's address that says a choice. */
  written(choice) {
    const found = new URLSearchParams();
    for (const [name, value] of Object.entries(this.defaults)) {
      const own = name === "with" ? choice.with.join(",") : choice[name];
      if (String(own) !== String(value)) found.set(name, own);
    }
    const text = found.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
    return text ? `?${text}` : "";
  }
}
