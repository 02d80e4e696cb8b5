/** Shows a picture while it grows: what is decided, the cells of the front, and dots where nothing is yet.
 *
 * Knows canvases and the fronts of a model's card; does not know requests.
 */

import { make } from "./elements.js";

const FRAME_MILLISECONDS = 45; // between two fronts: small models are done before the eye has seen any
const SIDE = 512; // of the canvas in its own pixels
const REDUCED = matchMedia("(prefers-reduced-motion: reduce)");

/** Whether whoever looks wants nothing to move. */
export const isStill = () => REDUCED.matches;

/** Wait as long as one front is shown. */
export const oneFrame = () => new Promise((resolve) => setTimeout(resolve, FRAME_MILLISECONDS));

/** The planes of a grid: one of a picture, several of a clip, none where codes have no place in the picture. */
function planesOf(grid) {
  if (grid.length === 2) return [{ rows: grid[0], columns: grid[1], first: 0 }];
  if (grid.length !== 3) return [];
  const [frames, rows, columns] = grid;
  return Array.from({ length: frames }, (_, frame) => ({ rows, columns, first: frame * rows * columns }));
}

/** One growing picture. `element` is a figure with a canvas, and at the end with what `finish` was given. */
export class Tile {
  /** `free` are the cells of an edit that are sampled; null is all of them. */
  constructor(card, { free = null } = {}) {
    this.card = card;
    this.free = free;
    this.frames = []; // {front, bitmap}, in order
    this.shown = -1;
    this.frontOf = new Map(card.fronts.flatMap((cells, front) => cells.map((cell) => [cell, front])));
    [this.width, this.height] = card.size.split("x").map(Number);
    this.canvas = make("canvas", { ariaHidden: "true" });
    this.element = make("figure", { className: "tile" }, this.canvas);
    const planes = planesOf(card.grid);
    const across = Math.ceil(Math.sqrt(planes.length || 1));
    this.planes = planes.map((plane, place) => ({ ...plane, x: place % across, y: Math.floor(place / across), across }));
    this.canvas.width = SIDE;
    this.canvas.height = Math.round((SIDE * this.height) / this.width);
    this.draw(-1, null);
  }

  /** Take the picture after a front; it is shown when those before it have been. */
  async push(front, blob) {
    const { width, height } = this.canvas;
    const smaller = this.width > width ? { resizeWidth: width, resizeHeight: height } : {}; // all fronts are kept
    const frame = { front, bitmap: blob && (await createImageBitmap(blob, smaller)) };
    if (front < (this.frames.at(-1)?.front ?? -1)) return; // a slower one that was overtaken
    this.frames.push(frame);
    this.#play();
  }

  /** Put the result (an img or video) in the canvas's place, once all fronts have been shown. */
  async finish(result) {
    while (this.playing) await this.playing;
    this.result = result;
    this.element.append(result);
    this.show(Infinity);
  }

  /** Whether fronts wait to be shown. */
  get isBehind() {
    return this.shown < this.frames.length - 1;
  }

  /** Show the picture as it was after a front; from the last on the result itself. */
  show(front) {
    const isDone = Boolean(this.result) && front >= this.card.num_fronts - 1;
    this.canvas.hidden = isDone;
    if (this.result) this.result.hidden = !isDone;
    if (isDone) return;
    const frame = this.frames.findLast((frame) => frame.front <= front); // a busy server leaves some out
    this.draw(frame?.front ?? -1, frame?.bitmap ?? null);
  }

  #play() {
    this.playing ??= this.#catchUp().finally(() => { this.playing = null; });
  }

  async #catchUp() {
    while (this.isBehind) {
      const frame = this.frames[++this.shown];
      if (isStill() || document.hidden) continue; // timers of a hidden page are slow, and nobody looks
      this.draw(frame.front, frame.bitmap);
      await oneFrame();
    }
  }

  /** Draw a picture after a front: -1 is before the first. */
  draw(front, bitmap) {
    const pen = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    const style = getComputedStyle(this.canvas.isConnected ? this.canvas : document.body);
    pen.imageSmoothingEnabled = false;
    pen.clearRect(0, 0, width, height);
    if (bitmap) pen.drawImage(bitmap, 0, 0, width, height);
    for (const { rows, columns, first, x, y, across } of this.planes) {
      const high = height / across / rows;
      const wide = width / across / columns;
      for (let cell = 0; cell < rows * columns; cell++) {
        const left = (x * columns + (cell % columns)) * wide;
        const top = (y * rows + Math.floor(cell / columns)) * high;
        this.#drawCell(pen, style.color, first + cell, front, Boolean(bitmap), left, top, wide, high);
      }
    }
  }

  #drawCell(pen, color, cell, front, isPicture, left, top, wide, high) {
    const own = this.frontOf.get(cell);
    const isFree = this.free === null || this.free.has(cell);
    const side = Math.min(wide, high);
    pen.fillStyle = pen.strokeStyle = color;
    if (isFree && own === front) {
      pen.globalAlpha = isPicture ? 0.22 : 0.9;
      pen.beginPath();
      pen.roundRect(left + side * 0.08, top + side * 0.08, wide - side * 0.16, high - side * 0.16, side * 0.16);
      pen.fill();
      pen.globalAlpha = 1;
      pen.lineWidth = Math.max(1.5, side * 0.07);
      pen.stroke();
    } else if (isFree && own > front) {
      pen.clearRect(left, top, wide, high);
      const share = own / Math.max(1, this.card.num_fronts - 1); // later fronts are paler
      pen.globalAlpha = 0.42 - 0.32 * share;
      pen.beginPath();
      pen.arc(left + wide / 2, top + high / 2, side * (0.17 - 0.08 * share), 0, 2 * Math.PI);
      pen.fill();
    } else if (!isPicture) {
      pen.globalAlpha = 0.5; // a clip shows which codes are there, not yet its frames
      pen.beginPath();
      pen.roundRect(left + side * 0.1, top + side * 0.1, wide - side * 0.2, high - side * 0.2, side * 0.16);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }
}
