// The drawing: strokes of mouse, pen or finger, or an image to draw on.

import { paint, placement, sample } from "./pixels.js";

const SIDE = 560; // pixels of the longer side on the screen
const RASTER = 280; // and of what is sampled for the network
const STROKE = 0.085; // width of the pen, of the shorter side

export class Pad {
  constructor(canvas, model, changed) {
    Object.assign(this, { canvas, model, changed, empty: true, colour: null, last: null });
    const longer = Math.max(model.width, model.height);
    canvas.width = Math.round((SIDE * model.width) / longer);
    canvas.height = Math.round((SIDE * model.height) / longer);
    this.context = canvas.getContext("2d");
    this.small = document.createElement("canvas");
    this.small.width = Math.max(Math.round((RASTER * model.width) / longer), model.width);
    this.small.height = Math.max(Math.round((RASTER * model.height) / longer), model.height);
    this.reader = this.small.getContext("2d", { willReadFrequently: true });
    this.ground = model.frame?.ground ?? 0;
    this.colour = this.ground < 0.5 ? "#ffffff" : "#000000";
    this.clear();
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#go(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.#end(event));
  }

  clear() {
    const level = Math.round(255 * this.ground);
    this.context.fillStyle = `rgb(${level} ${level} ${level})`;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.empty = true;
    this.last = null;
  }

  show(bytes) {
    const image = document.createElement("canvas");
    paint(image, bytes, this.model);
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    this.empty = false;
  }

  // What the network shall see of the drawing, and where it lies there; null if there is no ink.
  take() {
    const { width: columns, height: rows } = this.small;
    this.reader.drawImage(this.canvas, 0, 0, columns, rows);
    const { data } = this.reader.getImageData(0, 0, columns, rows);
    const { channels } = this.model;
    const towards = (this.ground >= 0.5 ? 0 : 1) - this.ground;
    const ink = new Float32Array(channels * rows * columns);
    for (let i = 0; i < rows * columns; i++) {
      for (let c = 0; c < channels; c++) {
        ink[c * rows * columns + i] = Math.max(0, (data[4 * i + c] / 255 - this.ground) / towards);
      }
    }
    const place = placement(ink, rows, columns, this.model);
    if (!place) return null;
    const scale = this.canvas.width / columns; // from the sampled raster to the pixels of the drawing
    const [x, y, sx, sy] = [place.x, place.y, place.sx, place.sy].map((value) => value * scale);
    return { bytes: sample(ink, rows, columns, place, this.model), place: { x, y, sx, sy } };
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  #begin(event) {
    if (event.button !== 0 || this.last) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.pointer = event.pointerId;
    this.last = this.#point(event);
    this.#line([this.last]);
  }

  #go(event) {
    if (!this.last || event.pointerId !== this.pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    this.#line((events.length ? events : [event]).map((one) => this.#point(one)));
  }

  #end(event) {
    if (event.pointerId === this.pointer) this.last = null;
  }

  #line(points) {
    const pen = this.context;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = STROKE * Math.min(this.canvas.width, this.canvas.height);
    pen.strokeStyle = this.colour;
    pen.beginPath();
    pen.moveTo(...this.last);
    for (const point of points) pen.lineTo(...point);
    pen.stroke();
    this.last = points.at(-1);
    this.empty = false;
    this.changed();
  }
}
