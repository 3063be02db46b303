// Images as bytes: [channels, height, width], row by row, as the network has them; and their way to and from a canvas.

export function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export function paint(canvas, bytes, { channels, height, width }) {
  canvas.width = width;
  canvas.height = height;
  if (!bytes) return;
  const image = new ImageData(width, height);
  const area = width * height;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[(channels === 3 ? c * area : 0) + i];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// A PGM or PPM file: what the server reads as an image of exactly these pixels.
export function file(bytes, { channels, height, width }) {
  const head = new TextEncoder().encode(`P${channels === 3 ? 6 : 5}\n${width} ${height}\n255\n`);
  const content = new Uint8Array(head.length + bytes.length);
  content.set(head);
  const area = width * height;
  for (let i = 0; i < area; i++) for (let c = 0; c < channels; c++) content[head.length + channels * i + c] = bytes[c * area + i];
  return content;
}

// The part of a drawing that the network shall see: its ink scaled to the length that the training images' has, and its
// centre of mass in the middle, as near as the box allows; without a frame, the whole drawing.
// `ink` is Float32 [channels, rows, columns] in [0, 1]. Returns null without ink, else where a pixel of the network begins
// in the drawing: x, y, and its sides sx, sy in pixels of the drawing.
export function placement(ink, rows, columns, { channels, height, width, frame }) {
  if (!frame) return { x: 0, y: 0, sx: columns / width, sy: rows / height };
  const across = new Float64Array(columns);
  const down = new Float64Array(rows);
  let [left, right, top, bottom] = [columns, 0, rows, 0];
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      let strength = 0;
      for (let c = 0; c < channels; c++) strength = Math.max(strength, ink[(c * rows + y) * columns + x]);
      across[x] += strength;
      down[y] += strength;
      if (strength > 0.3) {
        left = Math.min(left, x);
        right = Math.max(right, x + 1);
        top = Math.min(top, y);
        bottom = Math.max(bottom, y + 1);
      }
    }
  }
  if (right <= left) return null;
  const scale = Math.max((bottom - top) / (frame.box * height), (right - left) / (frame.box * width));
  const start = (sums, first, last, size) => {
    let [total, moment] = [0, 0];
    for (let i = first; i < last; i++) {
      total += sums[i];
      moment += sums[i] * (i + 0.5);
    }
    // The middle is pixel 14 of 28, as in MNIST.
    return Math.min(Math.max(moment / total - (Math.floor(size / 2) + 0.5) * scale, last - size * scale), first);
  };
  return { x: start(across, left, right, width), y: start(down, top, bottom, height), sx: scale, sy: scale };
}

// Averages of the ink over the network's pixels, as bytes on the ground's level.
export function sample(ink, rows, columns, place, { channels, height, width, frame }) {
  const ground = frame?.ground ?? 0;
  const weights = (count, size, start, side) =>
    Array.from({ length: count }, (_, i) => {
      const [from, to] = [Math.max(start + i * side, 0), Math.min(start + (i + 1) * side, size)];
      const parts = [];
      for (let p = Math.floor(from); p < to; p++) parts.push([p, (Math.min(p + 1, to) - Math.max(p, from)) / side]);
      return parts;
    });
  const [ys, xs] = [weights(height, rows, place.y, place.sy), weights(width, columns, place.x, place.sx)];
  const means = new Float32Array(channels * height * width);
  let peak = 0.25;
  const line = new Float32Array(columns);
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      line.fill(0);
      for (const [row, weight] of ys[y]) {
        for (let x = 0; x < columns; x++) line[x] += weight * ink[(c * rows + row) * columns + x];
      }
      for (let x = 0; x < width; x++) {
        let sum = 0;
        for (const [column, weight] of xs[x]) sum += weight * line[column];
        means[(c * height + y) * width + x] = sum;
        peak = Math.max(peak, sum);
      }
    }
  }
  const towards = (ground >= 0.5 ? 0 : 1) - ground;
  const gain = frame ? 1 / peak : 1; // thin strokes fade when scaled down
  return Uint8Array.from(means, (mean) => Math.round(255 * (ground + towards * Math.min(1, mean * gain))));
}
