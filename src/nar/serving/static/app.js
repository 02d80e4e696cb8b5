/** The page: settings, pictures that grow, the gallery, and one result in large.
 *
 * Uses the public routes of its server and nothing else. Routes are in server.js, the form in settings.js, growing
 * pictures in growth.js, the mask in mask.js, what is kept in shelf.js; here is what happens when something is clicked.
 */

import { at, make } from "./elements.js";
import { Tile, isStill, oneFrame } from "./growth.js";
import { MaskEditor } from "./mask.js";
import { Refused, ask, events, numWaiting, pause, useKey } from "./server.js";
import { chooseModel, linkTo, modelOf, models, offerModels, randomSeed, readLink, readSettings, resetSettings, writeSettings } from "./settings.js";
import { Shelf, fromBase64, settingsIn, withSettings } from "./shelf.js";

const MOST_SEED = 2 ** 32;
const MOST_TRIES = 30; // of a request that is refused for now

const shelf = new Shelf();
const editor = new MaskEditor();
let source = null; // {blob} of what is continued, {blob, canvas} of what is edited
let run = null; // {stop, tiles} while something is generated
let tiles = []; // of the last run
let viewed = null; // the item that is shown in large
let recalled = -1; // which of the earlier prompts is in the field

/** Say something to who can't see it; the eyes have the bar. */
function announce(text) {
  at("status").textContent = text;
}

function showError(message) {
  at("error").textContent = message ?? "";
  at("error").hidden = !message;
  if (message) at("error").scrollIntoView({ block: "nearest" });
}

/** A result in words: the prompt, the class, or both. */
function described(settings) {
  return [settings.prompt, settings.class_label].filter((word) => word).join(", ") || "no condition";
}

/** Do something that may need a key, asking for one as long as the server does. */
async function withKey(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 401) throw error;
      const dialog = at("key-dialog");
      at("key-error").textContent = error.message;
      dialog.returnValue = "";
      if (!dialog.open) dialog.showModal();
      await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
      if (dialog.returnValue !== "given") throw error; // closed without an answer
      useKey(at("key").value);
    }
  }
}

/** The chosen model is another one, or its settings are its own again. */
function modelChosen(isOther) {
  at("file-label").textContent = models.chosen.takes.includes("image") ? "Edit a picture of yours" : "Continue a picture or clip of yours";
  leaveSource();
  if (run) return;
  at("generate").disabled = false;
  if (isOther) showIdle();
}

/** Generate what the address asks for, if it names a seed. */
function followLink() {
  attempt(() => {
    const settings = readLink(location.hash);
    if (!settings) return;
    writeSettings(settings);
    history.replaceState(null, "", location.pathname + location.search); // a reload does not generate again
    if (at("settings").reportValidity()) generate(readSettings());
  });
}

/** Run something whose refusals are shown. */
async function attempt(action) {
  showError(null);
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    showError(error.message);
  }
}

// Generating

/** Before the first run: the fronts of the model as dots, paler where they come later. */
function showIdle() {
  tiles = [];
  at("growth").hidden = true;
  const tokens = models.chosen.grid.reduce((product, side) => product * side, 1);
  const shape = models.chosen.grid.length > 1 ? `${models.chosen.grid.join("×")} = ` : "";
  at("progress").textContent = `${shape}${tokens} codes in ${models.chosen.num_fronts} steps`;
  const tile = new Tile(models.chosen);
  at("tiles").replaceChildren(tile.element);
  at("tiles").dataset.count = 1;
  tile.draw(-1, null);
}

/** Generate what `settings` ask for; `given` is {image, mask, cells} of an edit or {reference} of a clip to continue. */
async function generate(settings, given = {}) {
  if (run) run.controller.abort();
  const one = modelOf(settings.model);
  const controller = new AbortController();
  const current = { controller, fronts: new Map(), settings, given, card: one, began: performance.now(), times: [], isWaiting: true };
  run = current;
  tiles = Array.from({ length: settings.n }, () => new Tile(one, { free: given.cells ?? null }));
  at("tiles").replaceChildren(...tiles.map((tile) => tile.element));
  at("tiles").dataset.count = settings.n;
  for (const tile of tiles) tile.draw(-1, null);
  current.tiles = tiles;
  at("growth").hidden = true;
  at("bar").hidden = at("stop").hidden = false;
  at("generate").disabled = at("redraw").disabled = true;
  showError(null);
  announce("Generating");
  if (matchMedia("(max-width: 56rem)").matches) at("stage").scrollIntoView({ behavior: isStill() ? "auto" : "smooth" });
  showProgress(current);
  const clock = setInterval(() => showWait(current), 1000);
  try {
    await (one.kind === "video" ? makeClips(current) : makePictures(current));
    if (run === current) showDone(current);
  } catch (error) {
    if (run === current) at("progress").textContent = error.name === "AbortError" ? "Stopped" : "Failed";
    if (error.name === "AbortError") announce("Stopped");
    else showError(error.message);
    if (error.name !== "AbortError" && !(error instanceof Refused)) throw error;
  } finally {
    clearInterval(clock);
    controller.abort();
    if (run === current) {
      run = null;
      at("bar").hidden = at("stop").hidden = true;
      at("generate").disabled = at("redraw").disabled = false;
    }
  }
}

/** Ask, and ask again when the server is full and says for how long. */
async function askPatiently(current, path, options) {
  const { signal } = current.controller;
  for (let tries = 1; ; tries++) {
    try {
      return await withKey(() => ask(path, { ...options, signal }));
    } catch (error) {
      if (!(error instanceof Refused) || error.retrySeconds === null || tries === MOST_TRIES) throw error;
      for (let left = Math.max(1, Math.ceil(error.retrySeconds)); left > 0; left--) {
        at("progress").textContent = `${error.message} (asking again in ${left} s)`;
        await pause(1, signal);
      }
    }
  }
}

/** Pictures as events: each front, then the result. */
async function makePictures(current) {
  const { settings, given, card: one, controller } = current;
  let [path, body] = ["v1/images/generations", { ...settings, stream: true, partial_images: one.num_fronts - 1 }];
  if (given.image) {
    const fields = Object.entries(body);
    [path, body] = ["v1/images/edits", new FormData()];
    for (const [name, value] of fields) body.append(name, value);
    body.append("image", given.image, "image.png");
    body.append("mask", given.mask, "mask.png");
  }
  const response = await askPatiently(current, path, { body });
  let left = settings.n;
  const shown = [];
  for await (const event of events(response)) {
    const index = event.image_index ?? 0;
    const tile = current.tiles[index];
    const blob = fromBase64(event.b64_json, `image/${event.output_format}`);
    if (event.type.endsWith(".partial_image")) {
      tile.push(event.front, blob);
      current.fronts.set(index, event.front + 1);
    } else {
      current.fronts.set(index, one.num_fronts);
      shown.push(tile.finish(await keep(current, index, blob)));
      left--;
    }
    showProgress(current);
  }
  if (left && !controller.signal.aborted) throw new Refused("The server ended the answer before its last picture.");
  await Promise.all(shown);
}

/** Clips as jobs, one a seed: asked for, looked at until they are done, fetched. */
async function makeClips(current) {
  const { settings, given, card: one, controller } = current;
  const { n, ...shared } = settings;
  await Promise.all(current.tiles.map(async (tile, index) => {
    const seed = (settings.seed + index) % MOST_SEED;
    const body = new FormData();
    for (const [name, value] of Object.entries({ ...shared, seed })) body.append(name, value);
    if (given.reference) body.append("input_reference", given.reference, "reference");
    let job = await (await askPatiently(current, "v1/videos", { body })).json();
    controller.signal.addEventListener("abort", () => {
      if (job.status === "queued" || job.status === "in_progress") ask(`v1/videos/${job.id}`, { method: "DELETE" }).catch(() => {});
    });
    while (job.status === "queued" || job.status === "in_progress") {
      const answer = await ask(`v1/videos/${job.id}`, { signal: controller.signal });
      job = await answer.json();
      const done = Math.floor((job.progress / 100) * one.num_fronts);
      if (done > (current.fronts.get(index) ?? 0)) tile.push(done - 1, null);
      current.fronts.set(index, done);
      showProgress(current);
      await pause((Number(answer.headers.get("openai-poll-after-ms")) || 500) / 1000, controller.signal);
    }
    if (job.status !== "completed") throw new Refused(job.error?.message ?? `The clip is ${job.status}.`);
    const blob = await (await ask(`v1/videos/${job.id}/content`, { signal: controller.signal })).blob();
    await tile.finish(await keep({ ...current, settings: { ...shared, seed, n: 1 } }, 0, blob));
  }));
}

/** Put a result into the gallery; gives what is shown in the place where it grew. */
async function keep(current, index, blob) {
  const { settings, given, card: one } = current;
  const seconds = (performance.now() - current.began) / 1000;
  current.times.push(seconds);
  const item = { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, created: Date.now(), kind: one.kind, blob, settings, index, given, seconds };
  await shelf.add(item);
  showGallery();
  const open = make("button", { type: "button", textContent: `seed ${settings.seed}${settings.n > 1 ? `, ${index + 1}/${settings.n}` : ""}` });
  open.setAttribute("aria-label", `Open ${described(settings)}, ${open.textContent}`);
  open.addEventListener("click", () => view(item));
  const media = mediaOf(item);
  if (item.kind === "image") media.addEventListener("click", () => view(item));
  return make("div", { className: "result" }, media, open);
}

/** A picture, or a clip that plays in a loop unless nothing should move. */
function mediaOf(item) {
  const src = addressOf(item);
  if (item.kind === "image") return make("img", { src, alt: described(item.settings) });
  const video = make("video", { src, loop: !isStill(), muted: true, autoplay: !isStill(), playsInline: true, controls: true });
  video.setAttribute("aria-label", described(item.settings));
  return video;
}

const addresses = new WeakMap(); // of items: one each, which stays when an item is deleted that is still shown

function addressOf(item) {
  if (!addresses.has(item)) addresses.set(item, URL.createObjectURL(item.blob));
  return addresses.get(item);
}

function showProgress(current) {
  if (run !== current) return;
  const fronts = [...current.fronts.values()];
  const total = current.card.num_fronts;
  const share = fronts.reduce((sum, front) => sum + front, 0) / (total * current.tiles.length);
  current.isWaiting = share === 0;
  at("bar").value = share;
  if (current.isWaiting) return showWait(current);
  const least = Math.min(...current.tiles.map((_, index) => current.fronts.get(index) ?? 0));
  at("progress").textContent = `front ${least} of ${total}`;
  const quarter = Math.floor(4 * share);
  if (quarter > (current.quarter ?? 0) && quarter < 4) announce(`${25 * quarter} %`);
  current.quarter = quarter;
}

/** Before the first front: for how long, and how many wait for the model. */
async function showWait(current) {
  if (run !== current || !current.isWaiting || at("progress").textContent.includes("asking again")) return;
  const seconds = Math.round((performance.now() - current.began) / 1000);
  if (seconds < 1) {
    at("progress").textContent = "asking…";
    return;
  }
  const waiting = await numWaiting(current.card.id, current.controller.signal).catch(() => null);
  if (!current.isWaiting || run !== current) return;
  at("progress").textContent = `waiting for a place, ${seconds} s${waiting ? `; ${waiting} in the queue` : ""}`;
}

function showDone(current) {
  const seconds = Math.max(...current.times).toFixed(1); // without what it took to show them
  const { n, seed } = current.settings;
  const what = current.card.kind === "video" ? "clip" : "picture";
  const text = `${n} ${what}${n > 1 ? "s" : ""} in ${seconds} s`;
  at("progress").textContent = `${text}, ${current.card.num_fronts} steps`;
  announce(`${text}: ${described(current.settings)}, seed ${seed}`);
  at("growth").hidden = current.card.kind === "video" || isStill();
  at("front").max = current.card.num_fronts;
  showFront(current.card.num_fronts);
}

/** Show all pictures of the last run as they were after so many fronts. */
function showFront(count) {
  at("front").value = count;
  at("front-value").textContent = `front ${count} of ${at("front").max}`;
  for (const tile of tiles) tile.show(count - 1);
}

/** Let the last run grow again, unless another begins. */
async function replay() {
  const shown = tiles;
  at("replay").disabled = true;
  for (let count = 0; count <= at("front").max && tiles === shown; count++) {
    showFront(count);
    await oneFrame();
  }
  at("replay").disabled = false;
}

// Gallery

function showGallery() {
  at("kept").textContent = shelf.isKept || !shelf.items.length ? "" : "This browser keeps them only as long as the page is open.";
  at("empty").hidden = shelf.items.length === 0;
  const known = new Map([...at("items").children].map((entry) => [entry.dataset.id, entry]));
  at("items").replaceChildren(...shelf.items.map((item) => known.get(item.id) ?? entryOf(item)));
}

/** An entry of the gallery; clips move while one points at them. */
function entryOf(item) {
  const open = make("button", { type: "button" });
  open.setAttribute("aria-label", `Open ${described(item.settings)}, seed ${item.settings.seed}`);
  open.addEventListener("click", () => view(item));
  if (item.kind === "image") open.append(make("img", { src: addressOf(item), alt: "", loading: "lazy" }));
  else {
    const video = make("video", { src: addressOf(item), loop: true, muted: true, playsInline: true, preload: "auto", tabIndex: -1 });
    for (const name of ["pointerenter", "focus"]) open.addEventListener(name, () => isStill() || video.play().catch(() => {}));
    for (const name of ["pointerleave", "blur"]) open.addEventListener(name, () => video.pause());
    open.append(video);
  }
  const entry = make("li", {}, open);
  entry.dataset.id = item.id;
  return entry;
}

/** Show an item in large, with what it was made of and what can be done with it. */
async function view(item) {
  viewed = item;
  const { settings, given } = item;
  const one = modelOf(settings.model);
  const place = shelf.items.indexOf(item);
  at("viewer-title").textContent = described(settings);
  at("viewer-status").textContent = one ? "" : `The model ${settings.model} is not on this server.`;
  at("large").replaceChildren(mediaOf(item));
  const facts = { ...settings, picture: settings.n > 1 ? `${item.index + 1} of ${settings.n}` : undefined, made: new Date(item.created).toLocaleString(), took: `${item.seconds.toFixed(1)} s` };
  if (given.image) facts.kind = "an edit of another picture";
  if (given.reference) facts.kind = "continues another picture or clip";
  delete facts.n;
  at("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value !== undefined && value !== "").flatMap(([name, value]) =>
    [make("dt", { textContent: name.replaceAll("_", " ") }), make("dd", { textContent: value })]));
  at("previous").disabled = place <= 0;
  at("next").disabled = place === shelf.items.length - 1;
  for (const name of ["again", "fresh", "use"]) at(name).disabled = !one;
  at("edit").hidden = !one?.takes.includes("image") || item.kind !== "image";
  at("extend").hidden = !clipModel();
  at("link").hidden = !one || Boolean(given.image || given.reference);
  at("link").href = linkTo(settings);
  const name = described(settings).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  at("download").download = `${settings.model}-${name}-${settings.seed}${settings.n > 1 ? `-${item.index + 1}` : ""}.${item.kind === "image" ? "png" : "mp4"}`;
  if (!at("viewer").open) at("viewer").showModal();
  URL.revokeObjectURL(at("download").href);
  at("download").removeAttribute("href");
  const file = item.kind === "image" ? await withSettings(item.blob, { ...settings, index: item.index }) : item.blob;
  if (viewed === item) at("download").href = URL.createObjectURL(file);
}

/** Close what is shown in large, and do something with it. */
function leaveViewer(action) {
  at("viewer").close();
  attempt(() => action(viewed));
}

async function remove(item) {
  const place = shelf.items.indexOf(item);
  await shelf.remove(item);
  showGallery();
  const other = shelf.items[Math.min(place, shelf.items.length - 1)];
  if (other) view(other);
  else at("viewer").close();
}

// Editing and continuing

const clipModel = () => [models.chosen, ...models.all].find((one) => one?.takes.includes("input_reference"));

/** Take a picture to edit, or a picture or clip to continue, as the chosen model can. */
async function openSource(blob) {
  showError(null);
  if (models.chosen.takes.includes("image")) {
    const bitmap = await createImageBitmap(blob).catch(() => {
      throw new Refused("This file is no picture that the browser can read: PNG, JPEG or WebP.");
    });
    const [width, height] = models.chosen.size.split("x").map(Number);
    const canvas = make("canvas", { width, height });
    const scale = Math.max(width / bitmap.width, height / bitmap.height); // what is longer is cut at both ends
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(bitmap, (width - bitmap.width * scale) / 2, (height - bitmap.height * scale) / 2, bitmap.width * scale, bitmap.height * scale);
    source = { canvas, blob: await new Promise((resolve) => canvas.toBlob(resolve, "image/png")) };
    editor.open(canvas, models.chosen);
    at("editor").hidden = false;
    at("generate").textContent = "Redraw what is painted";
    at("mask").focus();
    at("editor").scrollIntoView({ block: "start", behavior: isStill() ? "auto" : "smooth" });
  } else if (models.chosen.takes.includes("input_reference")) {
    source = { blob };
    const image = at("source").querySelector("img");
    URL.revokeObjectURL(image.src);
    image.hidden = !blob.type.startsWith("image/");
    if (!image.hidden) image.src = URL.createObjectURL(blob);
    at("source").querySelector("span").textContent = blob.type.startsWith("image/") ? "continues this picture" : "continues a clip";
    at("source").hidden = false;
  } else throw new Refused(`${models.chosen.id} neither edits nor continues pictures.`);
}

function leaveSource() {
  source = null;
  at("editor").hidden = at("source").hidden = true;
  at("generate").textContent = "Generate";
}

/** What a run is given besides its settings: nothing, a picture and its mask, or what it continues. */
async function readSource() {
  if (!source) return {};
  if (!source.canvas) return { reference: source.blob };
  const cells = editor.cells();
  if (!cells.size) throw new Refused("Nothing is painted: paint what is to be redrawn, or close the editor.");
  return { image: source.blob, mask: await editor.blob(), cells };
}

/** A file that was chosen or dropped. A picture from here brings its settings. */
async function openFile(file) {
  const settings = await settingsIn(file);
  if (settings && modelOf(settings.model)) {
    writeSettings(settings);
    announce("The settings of this picture are in the form.");
  }
  await openSource(file);
}

// What is clicked, typed and dropped

function listen() {
  const on = (id, action) => at(id).addEventListener("click", action);
  at("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(async () => { if (!run) generate(readSettings(), await readSource()); });
  });
  at("more").addEventListener("invalid", () => { at("more").open = true; }, true); // else the browser can't show it
  at("guidance_range").addEventListener("input", () => { at("guidance_scale").value = at("guidance_range").value; });
  at("guidance_scale").addEventListener("input", () => { at("guidance_range").value = at("guidance_scale").value; });
  at("seed").addEventListener("input", () => { at("keep").checked = at("seed").value !== ""; });
  at("prompt").addEventListener("keydown", recall);
  on("reset", resetSettings);
  on("stop", () => run?.controller.abort());
  on("leave", leaveSource);
  at("source").querySelector("button").addEventListener("click", leaveSource);
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    if (file) attempt(() => openFile(file));
    at("file").value = ""; // so that the same one can be opened again
  });
  document.addEventListener("dragover", (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault(); // text goes into fields as ever
  });
  document.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (!file) return;
    event.preventDefault();
    attempt(() => openFile(file));
  });

  at("front").addEventListener("input", () => showFront(Number(at("front").value)));
  on("replay", replay);

  on("close", () => at("viewer").close());
  at("viewer").addEventListener("close", () => at("large").replaceChildren()); // a clip stops
  on("previous", () => view(shelf.items[shelf.items.indexOf(viewed) - 1]));
  on("next", () => view(shelf.items[shelf.items.indexOf(viewed) + 1]));
  on("again", () => leaveViewer((item) => { generate(item.settings, item.given); }));
  on("fresh", () => leaveViewer((item) => { generate({ ...item.settings, seed: randomSeed() }, item.given); }));
  on("use", () => leaveViewer((item) => writeSettings(item.settings)));
  on("edit", () => leaveViewer((item) => { writeSettings(item.settings); return openSource(item.blob); }));
  on("extend", () => leaveViewer((item) => {
    if (!models.chosen.takes.includes("input_reference")) chooseModel(clipModel().id);
    return openSource(item.blob);
  }));
  on("delete", () => remove(viewed));
  at("link").addEventListener("click", async (event) => {
    if (!navigator.clipboard) return; // without https the browser has none: the link is followed
    event.preventDefault();
    await navigator.clipboard.writeText(at("link").href);
    at("viewer-status").textContent = "The link is copied; whoever opens it on this server gets the same.";
  });
  on("empty", async () => {
    if (!confirm(`Delete all ${shelf.items.length} results of this gallery?`)) return;
    await shelf.clear();
    showGallery();
  });
  window.addEventListener("hashchange", followLink);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) run?.controller.abort();
  });
}

/** In the prompt: Enter generates, arrows at its edges bring back what was asked before. */
function recall(event) {
  const field = at("prompt");
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("settings").requestSubmit();
    return;
  }
  const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  const rest = step === 1 ? field.value.slice(0, field.selectionStart) : field.value.slice(field.selectionEnd);
  if (!step || rest.includes("\n")) return;
  const earlier = [...new Set(shelf.items.map((item) => item.settings.prompt).filter(Boolean))];
  const place = recalled + step;
  if (place < -1 || place >= earlier.length) return;
  event.preventDefault();
  recalled = place;
  field.value = earlier[place] ?? "";
}

/** Light, dark, or as the system is; remembered. */
function chooseTheme() {
  const themes = ["auto", "light", "dark"];
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    at("theme").textContent = `Theme: ${theme}`;
    if (models.chosen && !tiles.length) showIdle(); // dots have the theme's colour
  };
  show(localStorage.getItem("nar.theme") ?? "auto");
  at("theme").addEventListener("click", () => {
    const theme = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    localStorage.setItem("nar.theme", theme);
    show(theme);
  });
}

chooseTheme();
listen();
await attempt(async () => {
  const listed = withKey(async () => (await ask("v1/models")).json());
  offerModels((await Promise.all([listed, shelf.open()]))[0].data, modelChosen);
  showGallery();
  followLink();
});
document.documentElement.dataset.ready = "true";
