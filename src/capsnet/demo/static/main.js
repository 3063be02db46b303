// The page: what is drawn goes to the server, what it answers goes to the panels.

import { Pad } from "./pad.js";
import { Bars, CouplingMap, Sliders, STEPS, Sweep, verdict } from "./panels.js";
import { decode, file, paint } from "./pixels.js";
import { Line, model as ask } from "./server.js";

const at = (id) => document.getElementById(id);

async function start() {
  const model = await ask();
  const state = {
    seen: null, // the last answer about an image
    place: null, // where its pixels lie on the drawing
    chosen: null, // a class, or null for the longest
    active: 0, // the dimension that is swept
    shown: null, // the class whose sliders are moved
    evidence: null,
  };
  const index = () => state.chosen ?? state.seen.winner;
  const notices = {};
  const notice = (about) => (message) => {
    notices[about] = message;
    at("notice").textContent = Object.values(notices).find(Boolean) ?? "";
  };

  at("model").textContent = `${model.name} · ${model.channels === 3 ? "colour" : "grey"}, ${model.width} × ${model.height} pixels`;
  at("size").textContent = `(${model.width} × ${model.height})`;
  const names = model.classes.join(" ");
  at("hint").textContent = names.length <= 40 ? `Draw one of\n${names}\nor drop an image here` : "Drop an image here, or draw";
  at("pad").style.setProperty("--hint", (model.frame?.ground ?? 0) < 0.5 ? "#a9aea9" : "#565c58");
  const redraw = (bytes) => ["redrawn", "redrawn-again"].forEach((id) => paint(at(id), bytes, model));

  const bars = new Bars(at("bars"), model.classes, choose);
  const sliders = new Sliders(at("sliders"), model.dim, { moved, pointed });
  const sweep = new Sweep(at("sweep"), model, (offset) => {
    if (!state.seen) return;
    sliders.set(state.active, offset);
    moved();
  });
  const pad = new Pad(at("drawing"), model, drawn);
  const map = new CouplingMap(at("coupling-map"), at("drawing"), model);
  const look = new Line("/api/look", looked, notice("look"));
  const imagine = new Line("/api/imagine", imagined, notice("imagine"));
  const evidence = new Line("/api/evidence", (found, question) => {
    state.evidence = { ...found, maps: new Float32Array(decode(found.maps).buffer), place: question.place, name: question.name };
    showMap();
  }, notice("evidence"));

  // an image

  let waiting = false;
  function drawn() {
    at("hint").hidden = true;
    if (waiting) return; // one look a frame of the screen
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (pad.empty) return;
      const taken = pad.take();
      if (!taken) return;
      look.ask({ type: "image/x-portable-anymap", query: query("no"), body: file(taken.bytes, model), place: taken.place });
    });
  }

  function query(invert) {
    return `?invert=${invert}${state.chosen === null ? "" : `&class=${state.chosen}`}`;
  }

  function read(image) {
    if (!image) return;
    look.ask({ type: image.type.startsWith("image/") ? image.type : "image/*", query: query("auto"), body: image, place: null });
  }

  function looked(found, question) {
    state.seen = found;
    if (question.place) {
      state.place = question.place;
    } else {
      const bytes = decode(found.image);
      state.place = { x: 0, y: 0, sx: pad.canvas.width / model.width, sy: pad.canvas.height / model.height };
      pad.show(bytes);
      at("hint").hidden = true;
    }
    showCapsule();
  }

  function clear() {
    look.forget();
    imagine.forget();
    evidence.forget();
    pad.clear();
    Object.assign(state, { seen: null, place: null, evidence: null });
    at("hint").hidden = false;
    at("file").value = "";
    for (const about of Object.keys(notices)) notice(about)("");
    sliders.reset();
    showCapsule();
  }

  // a capsule

  function choose(chosen) {
    state.chosen = chosen;
    if (state.seen) showCapsule();
  }

  function showCapsule() {
    const { seen } = state;
    document.body.classList.toggle("empty", !seen);
    bars.show(seen?.lengths);
    paint(at("seen"), seen && decode(seen.image), model);
    if (seen && state.shown !== index()) sliders.reset(); // what was moved belongs to another capsule
    if (seen) state.shown = index();
    sliders.start(seen && seen.poses[index()]);
    at("reset").disabled = !sliders.moved;
    showWinner();
    showTitles();
    if (seen) {
      draw();
      trace();
    } else {
      redraw(null);
      sweep.show(null, 0);
      showMap();
    }
  }

  let saying = 0;
  function showWinner() {
    const { seen } = state;
    const name = seen ? model.classes[seen.winner] : "";
    const { sure, text } = seen
      ? verdict(seen.lengths, model.classes, model.threshold !== null && seen.error > model.threshold)
      : { sure: false, text: "None yet: the longest capsule wins." };
    at("winner").textContent = name;
    at("glance").textContent = seen ? `${name}${sure ? "" : "?"} · ${seen.lengths[seen.winner].toFixed(2)}` : "";
    at("winner").classList.toggle("unsure", !sure);
    at("winner").classList.toggle("long", name.length > 4);
    const remarks = [seen?.inverted ? "light and dark were swapped" : "", ...(seen?.notes ?? [])].filter(Boolean);
    at("verdict").textContent = [text, ...remarks].join("; ");
    clearTimeout(saying); // once the drawing rests
    saying = setTimeout(() => {
      const said = seen ? `${sure ? "Winner" : "Perhaps"}: ${name}. ${text}` : "";
      if (at("said").textContent !== said) at("said").textContent = said;
    }, 600);
  }

  function showTitles() {
    const name = state.seen ? model.classes[index()] : null;
    at("dimensions-title").textContent = name === null ? "Dimensions of the capsule" : `Dimensions of capsule ${name}`;
    at("redrawn-caption").textContent = name === null ? "What its capsule redraws" : `What capsule ${name} redraws`;
    at("sweep-title").textContent = `Sweep of dimension ${state.active + 1}`;
    sliders.mark(state.active);
  }

  // its dimensions

  function draw() {
    const pose = sliders.pose;
    const swept = STEPS.map((step) => pose.map((value, i) => (i === state.active ? sliders.base[i] + step : value)));
    imagine.ask({ body: { class: index(), poses: [pose, ...swept] }, active: state.active });
  }

  function imagined({ images: [image, ...swept] }) {
    if (!state.seen) return;
    redraw(decode(image));
    sweep.show(swept, sliders.offsets[state.active]);
  }

  function moved(dimension = state.active) {
    state.active = dimension; // the pointer may rest on another, moved there by scrolling
    showTitles();
    at("reset").disabled = !sliders.moved;
    draw();
  }

  function pointed(dimension) {
    if (dimension === state.active) return;
    state.active = dimension;
    showTitles();
    if (state.seen) draw();
  }

  // its evidence

  function trace() {
    if (!at("overlay").checked || !state.seen) return;
    evidence.ask({ body: { class: index(), image: state.seen.image }, place: state.place, name: model.classes[index()] });
  }

  const numbered = model.steps[0] === "1"; // attention has no iterations
  function showMap() {
    const found = at("overlay").checked && state.seen && state.evidence;
    const iteration = at("iteration").valueAsNumber;
    if (found) map.show(found.maps, iteration - 1, found.place);
    else map.hide();
    at("iteration-value").textContent = numbered
      ? `${iteration} of ${model.steps.length}`
      : model.steps[iteration - 1];
    const most = Math.log2(model.classes.length).toFixed(3);
    at("overlay-text").textContent = found
      ? `Light marks the parts whose coupled votes make up ${found.name}. Its length is ${found.lengths[iteration - 1].toFixed(2)}; ` +
        `the couplings' entropy is ${found.entropy[iteration - 1].toFixed(3)} bits, where ${most} is undecided.`
      : "The parts of the image whose votes, coupled by the routing, make up the capsule.";
  }

  // controls

  at("iteration").max = at("iteration").value = model.steps.length;
  at("iteration").hidden = at("iteration-field").hidden = model.steps.length === 1; // uniform couplings
  at("iteration-name").textContent = numbered ? "Routing iteration" : "Couplings";
  at("iteration").addEventListener("input", showMap);
  at("overlay").addEventListener("change", () => {
    at("overlay-controls").hidden = !at("overlay").checked;
    state.evidence = null;
    showMap();
    trace();
  });
  at("clear").addEventListener("click", clear);
  at("reset").addEventListener("click", () => {
    sliders.reset();
    moved();
  });
  at("file").addEventListener("change", () => {
    read(at("file").files[0]);
    at("file").value = ""; // so that the same file can be chosen again
  });
  at("pen-field").hidden = model.channels === 1;
  at("pen").value = pad.colour;
  at("pen").addEventListener("input", () => (pad.colour = at("pen").value));
  let over = 0;
  addEventListener("dragenter", () => at("pad").classList.toggle("over", ++over > 0));
  addEventListener("dragleave", () => at("pad").classList.toggle("over", --over > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    over = 0;
    at("pad").classList.remove("over");
    read(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => read(event.clipboardData.files[0]));

  showCapsule();
}

start().catch((error) => {
  at("notice").textContent = `The page cannot start: ${error.message}`;
  throw error;
});
