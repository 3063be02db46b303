// What stands beside the drawing: lengths, sliders, the sweep, the coupling map. Nothing here asks the server.

import { decode, paint } from "./pixels.js";

const PRESENT = 0.5; // half-way between the margins 0.1 and 0.9 that a length is trained towards
export const STEPS = Array.from({ length: 11 }, (_, i) => Math.round((i - 5) * 5) / 100); // the paper's: -0.25 to 0.25 by 0.05

const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const plain = (value) => `${value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A radio button a class, and one for "the longest": `chosen(index or null)` is called.
export class Bars {
  constructor(box, classes, chosen) {
    const radio = (value, name) => {
      const input = element("input", { type: "radio", name: "capsule", value });
      input.addEventListener("change", () => chosen(value === "longest" ? null : Number(value)));
      return [input, element("span", { className: "name", textContent: name })];
    };
    box.style.setProperty("--names", `${Math.min(Math.max(...classes.map((name) => name.length)), 12) * 0.6 + 0.3}rem`);
    const longest = element("label", { className: "bar auto" }, ...radio("longest", "Follow the longest"));
    longest.firstChild.checked = true;
    this.rows = classes.map((name, index) => {
      const fill = element("span", { className: "fill" });
      const value = element("span", { className: "value", textContent: "0.00" });
      const row = element("label", { className: "bar" }, ...radio(String(index), name), element("span", { className: "rail" }, fill), value);
      return { row, fill, value };
    });
    box.replaceChildren(longest, ...this.rows.map(({ row }) => row));
  }

  show(lengths) {
    this.rows.forEach(({ row, fill, value }, index) => {
      const length = lengths?.[index] ?? 0;
      fill.style.transform = `translateX(${100 * (length - 1)}%)`;
      value.textContent = length.toFixed(2);
      row.classList.toggle("present", length >= PRESENT);
    });
  }
}

// In words, what the lengths say. `strange` is whether the winner redraws the image badly.
export function verdict(lengths, classes, strange) {
  const order = [...lengths.keys()].sort((a, b) => lengths[b] - lengths[a]);
  const [first, second] = order;
  const others = order.slice(1).filter((index) => lengths[index] >= PRESENT);
  const length = lengths[first].toFixed(2);
  if (strange) return { sure: false, text: `length ${length}, but it redraws the image badly: perhaps none of the classes` };
  if (lengths[first] < PRESENT) return { sure: false, text: `perhaps: its capsule is the longest, but only ${length}` };
  if (others.length) return { sure: true, text: `length ${length}; also present: ${others.map((index) => classes[index]).join(", ")}` };
  const next = second === undefined ? "" : `; next is ${classes[second]} with ${lengths[second].toFixed(2)}`;
  return { sure: true, text: `length ${length}${next}` };
}

// A slider a dimension, whose value is added to what the image gives.
export class Sliders {
  constructor(box, dim, { moved, pointed }) {
    this.offsets = new Array(dim).fill(0);
    this.base = null;
    box.style.setProperty("--rows", Math.ceil(dim / 2));
    this.rows = this.offsets.map((_, index) => {
      const input = element("input", { type: "range", id: `dimension-${index}`, min: -0.5, max: 0.5, step: 0.01, value: 0, disabled: true });
      const label = element("label", { htmlFor: input.id, textContent: index + 1 });
      input.setAttribute("aria-label", `Dimension ${index + 1}`);
      const output = element("output", { textContent: "–" });
      output.setAttribute("for", input.id);
      const row = element("div", { className: "slider" }, label, input, output);
      row.addEventListener("pointerenter", () => pointed(index));
      input.addEventListener("focus", () => pointed(index));
      input.addEventListener("input", () => {
        this.offsets[index] = input.valueAsNumber;
        this.#show(index);
        moved(index);
      });
      return { row, input, output };
    });
    box.replaceChildren(...this.rows.map(({ row }) => row));
  }

  get moved() {
    return this.offsets.some((offset) => offset !== 0);
  }

  get pose() {
    return this.base.map((value, index) => value + this.offsets[index]);
  }

  // The vector that the image gives; null if there is none.
  start(base) {
    this.base = base;
    this.offsets.forEach((_, index) => this.#show(index));
  }

  set(index, offset) {
    this.offsets[index] = offset;
    this.#show(index);
  }

  reset() {
    this.offsets.forEach((_, index) => this.set(index, 0));
  }

  mark(active) {
    this.rows.forEach(({ row }, index) => row.classList.toggle("active", index === active));
  }

  #show(index) {
    const { row, input, output } = this.rows[index];
    const offset = this.offsets[index];
    input.disabled = !this.base;
    input.value = offset;
    row.classList.toggle("moved", offset !== 0);
    const value = this.base ? plain(this.base[index] + offset) : "–";
    output.textContent = value;
    input.setAttribute("aria-valuetext", this.base ? `${value}, ${offset === 0 ? "as in the image" : `${signed(offset)} from the image`}` : "no image yet");
  }
}

// A picture a step of one dimension; `picked(offset)` is called.
export class Sweep {
  constructor(box, model, picked) {
    this.model = model;
    this.cells = STEPS.map((offset) => {
      const cell = element("canvas", { title: signed(offset) });
      cell.addEventListener("click", () => picked(offset));
      return cell;
    });
    box.replaceChildren(...this.cells);
    this.show(null, 0);
  }

  show(images, offset) {
    const nearest = STEPS.reduce((best, step) => (Math.abs(step - offset) < Math.abs(best - offset) ? step : best), 0);
    this.cells.forEach((cell, index) => {
      paint(cell, images ? decode(images[index]) : null, this.model);
      cell.classList.toggle("here", Boolean(images) && STEPS[index] === nearest && Math.abs(offset) < 0.275);
    });
  }
}

// Evidence as light over the drawing: clear where there is none, amber and then pale where it is most.
export class CouplingMap {
  constructor(canvas, drawing, { height, width }) {
    Object.assign(this, { canvas, drawing, height, width });
    this.small = element("canvas", { width, height });
  }

  hide() {
    this.canvas.hidden = true;
  }

  // `maps` are Float32 [iterations, height, width]; `place` says where the network's pixels lie on the drawing.
  show(maps, iteration, place) {
    const area = this.height * this.width;
    const peak = maps.reduce((most, value) => Math.max(most, value), 1e-9); // one scale for all iterations
    const image = new ImageData(this.width, this.height);
    for (let i = 0; i < area; i++) {
      const value = Math.max(0, maps[iteration * area + i]) / peak;
      const colour = value < 0.5 ? [150 + 200 * value, 40 + 200 * value, 20] : [250, 140 + 200 * (value - 0.5), 20 + 300 * (value - 0.5)];
      image.data.set([...colour, 225 * Math.min(1, 1.25 * value)], 4 * i);
    }
    this.small.getContext("2d").putImageData(image, 0, 0);
    this.canvas.width = this.drawing.width;
    this.canvas.height = this.drawing.height;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(this.small, place.x, place.y, place.sx * this.width, place.sy * this.height);
    this.canvas.hidden = false;
  }
}
