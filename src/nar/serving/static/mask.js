/** Paints a mask over a picture: by brush, eraser and rectangle, with a pointer, keys or numbers.
 *
 * Knows pixels and the cells of a model's grid, since a cell is redrawn when any of its pixels is painted; does not
 * know what is done with the mask.
 */

import { at, make } from "./elements.js";

const MOST_UNDO = 60;
const SIDE = 768; // of the canvas in its own pixels
const KEYS = { "[": "smaller", "]": "larger", b: "brush", e: "eraser", z: "undo", c: "clear", i: "invert" };
const blank = (width, height) => make("canvas", { width, height });

export class MaskEditor {
  constructor() {
    this.canvas = at("mask");
    this.pen = this.canvas.getContext("2d");
    this.size = at("brush");
    this.fields = ["x", "y", "width", "height"].map((name) => at(`rect-${name}`));
    this.canvas.addEventListener("pointerdown", (event) => this.#press(event));
    this.canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => this.#release());
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["undo", "clear", "invert"]) at(name).addEventListener("click", () => this[name]());
    at("rect-add").addEventListener("click", () => this.#fillRectangle(1));
    at("rect-remove").addEventListener("click", () => this.#fillRectangle(0));
    for (const field of this.fields) field.addEventListener("input", () => this.#readFields());
  }

  /** Begin with a picture at the model's size and, to go on with an earlier one, its mask as {0, 1} a pixel. */
  open(picture, card, mask = null) {
    this.picture = picture;
    this.width = picture.width;
    this.height = picture.height;
    [this.rows, this.columns] = card.grid;
    this.mask = mask ?? new Uint8Array(this.width * this.height);
    this.past = [];
    this.canvas.width = SIDE;
    this.canvas.height = Math.round((SIDE * this.height) / this.width);
    this.size.max = Math.max(2, Math.round(Math.min(this.width, this.height) / 2));
    this.size.value = Math.max(1, Math.round(Math.min(this.width, this.height) / 6));
    const [width, height] = [Math.ceil(this.columns / 2), Math.ceil(this.rows / 2)];
    this.rectangle = { x: this.columns - width, y: this.rows - height, width, height };
    this.fields.forEach((field, place) => { field.max = place % 2 ? this.rows : this.columns; });
    this.#writeFields();
    this.draw();
  }

  /** The cells that will be redrawn, as raster numbers. */
  cells() {
    const cells = new Set();
    this.mask.forEach((isNew, place) => {
      if (!isNew) return;
      const row = Math.floor((Math.floor(place / this.width) * this.rows) / this.height);
      cells.add(row * this.columns + Math.floor(((place % this.width) * this.columns) / this.width));
    });
    return cells;
  }

  /** A PNG of the picture's size, transparent where it is to be redrawn. */
  blob() {
    const image = new ImageData(this.width, this.height);
    this.mask.forEach((isNew, place) => { image.data[4 * place + 3] = isNew ? 0 : 255; });
    const canvas = blank(this.width, this.height);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  undo() {
    this.mask = this.past.pop() ?? this.mask;
    this.draw();
  }

  clear() {
    this.#remember();
    this.mask.fill(0);
    this.draw();
  }

  invert() {
    this.#remember();
    this.mask = this.mask.map((isNew) => 1 - isNew);
    this.draw();
  }

  get #tool() {
    return document.querySelector("[name=tool]:checked").value;
  }

  set #tool(name) {
    document.querySelector(`[name=tool][value=${name}]`).checked = true;
  }

  #remember() {
    this.past.push(this.mask.slice());
    if (this.past.length > MOST_UNDO) this.past.shift();
  }

  /** Where a pointer is, in pixels of the picture. */
  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    return { x, y: ((event.clientY - box.top) / box.height) * this.height };
  }

  #press(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.start = this.last = this.#place(event);
    this.#move(event);
  }

  #move(event) {
    if (!this.start) return;
    const place = this.#place(event);
    if (this.#tool === "rectangle") this.#span(place);
    else this.#stroke(this.last, place, this.#tool === "brush" ? 1 : 0);
    this.last = place;
    this.draw();
  }

  #release() {
    if (this.start && this.#tool === "rectangle") this.#fillRectangle(1, false);
    this.start = null;
  }

  /** Paint discs along a line, as a fast pointer skips pixels. */
  #stroke(from, to, value) {
    const radius = Number(this.size.value) / 2;
    const steps = Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / Math.max(0.5, radius / 2)) + 1;
    for (let step = 0; step <= steps; step++) {
      const x = from.x + ((to.x - from.x) * step) / steps;
      const y = from.y + ((to.y - from.y) * step) / steps;
      for (let row = Math.max(0, Math.floor(y - radius)); row <= Math.min(this.height - 1, y + radius); row++) {
        for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(this.width - 1, x + radius); column++) {
          const isUnder = Math.floor(x) === column && Math.floor(y) === row; // a brush of one pixel hits it anywhere
          if (isUnder || Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) this.mask[row * this.width + column] = value;
        }
      }
    }
  }

  /** The rectangle of cells between where a pointer was pressed and where it is. */
  #span(place) {
    const cell = ({ x, y }) => ({
      x: Math.min(this.columns - 1, Math.max(0, Math.floor((x / this.width) * this.columns))),
      y: Math.min(this.rows - 1, Math.max(0, Math.floor((y / this.height) * this.rows))),
    });
    const [from, to] = [cell(this.start), cell(place)];
    const [x, y] = [Math.min(from.x, to.x), Math.min(from.y, to.y)];
    this.rectangle = { x, y, width: Math.abs(from.x - to.x) + 1, height: Math.abs(from.y - to.y) + 1 };
    this.#writeFields();
  }

  #fillRectangle(value, isNew = true) {
    if (isNew) this.#remember();
    const { x, y, width, height } = this.rectangle;
    const [wide, high] = [this.width / this.columns, this.height / this.rows];
    for (let row = Math.round(y * high); row < Math.round((y + height) * high); row++) {
      this.mask.fill(value, row * this.width + Math.round(x * wide), row * this.width + Math.round((x + width) * wide));
    }
    this.draw();
  }

  /** Keep the rectangle inside of the grid, whatever numbers or keys made it. */
  #setRectangle({ x, y, width, height }) {
    const within = (value, low, high) => Math.min(high, Math.max(low, Math.round(value) || 0));
    width = within(width, 1, this.columns);
    height = within(height, 1, this.rows);
    this.rectangle = { x: within(x, 0, this.columns - width), y: within(y, 0, this.rows - height), width, height };
    this.draw();
  }

  #readFields() {
    const [x, y, width, height] = this.fields.map((field) => Number(field.value));
    this.#setRectangle({ x, y, width, height });
  }

  #writeFields() {
    const { x, y, width, height } = this.rectangle;
    [x, y, width, height].forEach((value, place) => { this.fields[place].value = value; });
  }

  #key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const { x, y, width, height } = this.rectangle;
    const name = KEYS[event.key.toLowerCase()];
    if (way) {
      const [across, down] = way;
      const changed = event.shiftKey ? { x, y, width: width + across, height: height + down } : { x: x + across, y: y + down, width, height };
      this.#setRectangle(changed);
      this.#writeFields();
    } else if (event.key === "Enter" || event.key === " ") this.#fillRectangle(1);
    else if (event.key === "Delete" || event.key === "Backspace") this.#fillRectangle(0);
    else if ((event.ctrlKey || event.metaKey || event.altKey) && name !== "undo") return; // the browser's own
    else if (name === "smaller" || name === "larger") this.size.value = Number(this.size.value) + (name === "larger" ? 1 : -1);
    else if (name === "brush" || name === "eraser") this.#tool = name;
    else if (name) this[name]();
    else return;
    event.preventDefault();
  }

  #say() {
    const { x, y, width, height } = this.rectangle;
    at("mask-state").textContent = `${this.cells().size} of ${this.rows * this.columns} cells will be redrawn. ` +
      `Rectangle: column ${x}, row ${y}, ${width} by ${height} cells.`;
  }

  /** What is painted, as a canvas of stripes: one colour alone would be lost on a picture that has it. */
  #painted(color) {
    const mask = blank(this.width, this.height);
    const image = new ImageData(this.width, this.height);
    this.mask.forEach((isNew, place) => { image.data[4 * place + 3] = 255 * isNew; });
    mask.getContext("2d").putImageData(image, 0, 0);
    const stripes = blank(16, 16);
    const line = stripes.getContext("2d");
    [line.fillStyle, line.strokeStyle, line.lineWidth] = [color, "#fff", 4];
    line.fillRect(0, 0, 16, 16);
    line.stroke(new Path2D("M-4 4 4-4M-4 20 20-4M12 20 20 12"));
    const canvas = blank(this.canvas.width, this.canvas.height);
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = pen.createPattern(stripes, "repeat");
    pen.fillRect(0, 0, canvas.width, canvas.height);
    return canvas;
  }

  /** Show the picture, what is painted, the cells that are redrawn with it, and the rectangle. */
  draw() {
    const { pen, canvas } = this;
    const accent = getComputedStyle(canvas).color;
    const [wide, high] = [canvas.width / this.columns, canvas.height / this.rows];
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.picture, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 0.6;
    pen.drawImage(this.#painted(accent), 0, 0);
    pen.globalAlpha = 1;
    for (const [color, line] of [["#fff", 4], [accent, 2]]) {
      [pen.strokeStyle, pen.lineWidth] = [color, line];
      for (const cell of this.cells()) {
        pen.strokeRect((cell % this.columns) * wide + 2, Math.floor(cell / this.columns) * high + 2, wide - 4, high - 4);
      }
    }
    const { x, y, width, height } = this.rectangle;
    for (const [color, dash] of [["#fff", []], ["#000", [8, 8]]]) { // seen on any picture
      pen.strokeStyle = color;
      pen.lineWidth = 3;
      pen.setLineDash(dash);
      pen.strokeRect(x * wide + 2, y * high + 2, width * wide - 4, height * high - 4);
    }
    pen.setLineDash([]);
    this.#say();
  }
}
