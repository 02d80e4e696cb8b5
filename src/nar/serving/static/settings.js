/** The form: which models there are and what each takes, what is asked for, and the address that asks for the same.
 *
 * Knows fields; does not know requests or what comes of them.
 */

import { at, make } from "./elements.js";
import { Refused } from "./server.js";

const MOST_CHIPS = 24; // classes beyond are found by typing
const NUMBERS = ["guidance_scale", "temperature", "top_k", "top_p"]; // settings that every model has
const WORDS = ["prompt", "negative_prompt"];
const OTHERS = ["model", "class_label", "seed", "n", "num_frames"];

/** What /v1/models says: of all models, and of the chosen one. */
export const models = { all: [], chosen: null };
export const modelOf = (id) => models.all.find((one) => one.id === id);
export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
let heard; // what is told of every choice

/** Show a card for each model that the server has, and choose the first; `chosen(isOther)` hears of every choice. */
export function offerModels(cards, chosen) {
  models.all = cards;
  heard = chosen;
  at("models").append(...cards.map((one) => {
    const steps = `${one.kind === "video" ? "clips" : "pictures"}, ${one.size.replace("x", "×")}, ${one.num_fronts} steps`;
    const radio = make("input", { type: "radio", name: "model", value: one.id });
    radio.addEventListener("change", () => chooseModel(one.id));
    return make("label", {}, radio, make("span", {}, make("strong", { textContent: one.id }), make("small", { textContent: steps })));
  }));
  chooseModel(cards[0].id);
}

/** Show the fields that a model takes, with its own settings. */
export function chooseModel(id) {
  const card = modelOf(id);
  const isOther = models.chosen !== card;
  models.chosen = card;
  document.querySelector(`[name=model][value="${CSS.escape(id)}"]`).checked = true;
  at("words").hidden = !card.takes.includes("prompt");
  at("without").hidden = !card.takes.includes("negative_prompt");
  at("length").hidden = card.kind !== "video";
  at("num_frames").value = card.num_frames ?? "";
  at("files").hidden = !card.takes.includes("image") && !card.takes.includes("input_reference");
  showClasses(card);
  resetSettings();
  heard(isOther);
}

/** The numbers that the model itself comes with. */
export function resetSettings() {
  for (const name of NUMBERS) at(name).value = models.chosen.defaults[name];
  at("guidance_range").value = models.chosen.defaults.guidance_scale;
}

/** Classes as chips, or where they are many as a field that knows them. */
function showClasses(card) {
  const box = at("classes");
  box.hidden = !card.takes.includes("class_label");
  box.replaceChildren(make("legend", { textContent: "Class" }));
  if (box.hidden) return;
  const names = card.class_names;
  box.classList.toggle("chips", names.length > 0 && names.length <= MOST_CHIPS);
  if (names.length && names.length <= MOST_CHIPS) {
    for (const [place, name] of ["", ...names].entries()) {
      const radio = make("input", { type: "radio", name: "class_label", value: name, checked: place === 0 });
      box.append(make("label", {}, radio, make("span", { textContent: name || "any" })));
    }
    return;
  }
  const field = make("input", { name: "class_label", placeholder: `a name, or 0 to ${card.num_classes - 1}` });
  field.setAttribute("list", "class-names");
  field.setAttribute("aria-label", "Class");
  box.append(field, make("datalist", { id: "class-names" }, ...names.map((value) => make("option", { value }))));
}

/** The class of the form; empty is any. */
function readClass() {
  const fields = [...document.querySelectorAll("[name=class_label]")];
  return fields.find((field) => field.type !== "radio" || field.checked)?.value.trim() ?? "";
}

/** What the form asks for, as the fields of a request. A seed that is not kept is a new one. */
export function readSettings() {
  const card = models.chosen;
  const settings = { model: card.id };
  for (const name of WORDS) if (card.takes.includes(name) && at(name).value.trim()) settings[name] = at(name).value.trim();
  if (readClass()) settings.class_label = readClass();
  for (const name of NUMBERS) settings[name] = Number(at(name).value);
  if (!at("keep").checked || at("seed").value === "") at("seed").value = randomSeed();
  settings.seed = Number(at("seed").value);
  settings.n = Number(at("n").value);
  if (card.kind === "video" && at("num_frames").value) settings.num_frames = Number(at("num_frames").value);
  return settings;
}

/** Fill the form with the fields of a request, its seed kept. Throws Refused for what can't be asked for here. */
export function writeSettings(settings) {
  const card = modelOf(settings.model ?? models.chosen.id);
  if (!card) throw new Refused(`The model ${settings.model} is not on this server; models here: ${models.all.map((one) => one.id).join(", ")}.`);
  const other = WORDS.find((name) => settings[name] && !card.takes.includes(name));
  if (other) throw new Refused(`${card.id} takes no ${other.replace("_", " ")}.`);
  chooseModel(card.id);
  for (const name of WORDS) at(name).value = settings[name] ?? "";
  for (const name of [...NUMBERS, "n", "num_frames"]) if (settings[name] !== undefined) at(name).value = settings[name];
  at("guidance_range").value = at("guidance_scale").value;
  writeClass(String(settings.class_label ?? ""));
  at("seed").value = settings.seed ?? "";
  at("keep").checked = settings.seed !== undefined;
}

/** Choose a class by its name or number. */
function writeClass(label) {
  const card = models.chosen;
  const fields = [...document.querySelectorAll("[name=class_label]")];
  const name = card.class_names[label] ?? label; // "3" is the fourth
  const field = fields.find((one) => one.type !== "radio" || one.value === name);
  if (field) [field.checked, field.value] = [true, name];
  else if (label) throw new Refused(`${card.id} has no class ${label}${fields.length ? `; classes: ${card.class_names.join(", ")}` : ""}.`);
}

/** An address that generates the same: what differs from the model's own settings stands in it. */
export function linkTo(settings) {
  const own = modelOf(settings.model);
  const told = Object.entries(settings).filter(([name, value]) => value !== own?.defaults[name] && value !== own?.[name]);
  return `${location.origin}${location.pathname}${location.search}#${new URLSearchParams(told)}`;
}

/** The settings in an address; null where it names no seed. Throws Refused for settings that there are not. */
export function readLink(hash) {
  const settings = Object.fromEntries(new URLSearchParams(hash.slice(1)));
  if (settings.seed === undefined) return null;
  const known = [...WORDS, ...NUMBERS, ...OTHERS];
  const other = Object.keys(settings).find((name) => !known.includes(name));
  if (other) throw new Refused(`The link has a setting ${other}; known ones: ${known.join(", ")}.`);
  return { n: 1, ...settings };
}
