// A valley to play with: gradient descent and IRE side by side, on two parameters theta = (u, v).
// Each <div class="ire-valley"> becomes one. tests/test_book.py holds the arithmetic to toy/valley.py.
"use strict";

// ------------------------------------------------------------------------------ the losses
// loss and gradient; trace of the Hessian on the floor; h: the Gauss-Newton diagonal, by which IRE
// tells flat from sharp; the limits of eta and kappa at the start; what the map shows.
const LOSSES = {
  valley: {
    name: "the paper's valley, (1 + u²) v² / 2",
    loss: ([u, v]) => (1 + u * u) * v * v / 2,
    gradient: ([u, v]) => [u * v * v, (1 + u * u) * v],
    trace: ([u]) => 1 + u * u,
    h: ([u, v]) => [u * u * v * v / (1 + u * u), 1 + u * u],
    sharpest: ([u]) => 1 + u * u,
    kappaMax: (eta, [, v]) => 2 / (eta * v * v) - 1,
    start: [1, 0.01], eta: 1, kappa: 900, u: [-1.2, 1.2], v: [-0.032, 0.032],
  },
  quadratic: {
    name: "a quadratic, (0.04 u² + 2 v²) / 2",
    loss: ([u, v]) => (0.04 * u * u + 2 * v * v) / 2,
    gradient: ([u, v]) => [0.04 * u, 2 * v],
    trace: () => 2.04,
    h: () => [0.04, 2],
    sharpest: () => 2,
    kappaMax: eta => 2 / (eta * 0.04) - 1,
    start: [1, 0.5], eta: 0.9, kappa: 20, u: [-1.2, 1.2], v: [-0.8, 0.8],
  },
  curved: {
    name: "a curved valley, (v − u²/2)² / 2",
    loss: ([u, v]) => (v - u * u / 2) ** 2 / 2,
    gradient: ([u, v]) => [-u * (v - u * u / 2), v - u * u / 2],
    trace: ([u]) => 1 + u * u,
    h: ([u]) => [u * u, 1],
    sharpest: ([u]) => 1 + u * u,
    // the wall leans, so that u has a share in the sharp direction
    kappaMax: (eta, [u]) => (2 / eta - 1 - u * u) / Math.min(u * u, 1),
    start: [0.9, 0.8], eta: 0.5, kappa: 2, u: [-1.2, 1.2], v: [-0.4, 1.2],
  },
};
const STEPS = 300;

/** The path of (u, v), cut where it has diverged; kappa = 0 is gradient descent. */
function run(loss, start, eta, kappa) {
  const { gradient, h } = LOSSES[loss];
  const path = [start];
  let flat;
  while (path.length <= STEPS && Math.max(...path.at(-1).map(Math.abs)) < 1e3) {
    const old = path.at(-1);
    if ((path.length - 1) % 10 === 0) {  // a new mask: the flatter of the two coordinates
      const curvature = h(old);
      flat = curvature.map(x => x <= Math.min(...curvature));
    }
    const g = gradient(old);
    const base = old.map((x, i) => x - eta * g[i]);
    path.push(base.map((x, i) => flat[i] ? x + kappa * (x - old[i]) : x));
  }
  return path;
}

// -------------------------------------------------------------------------------- drawing
/** A canvas as sharp as the screen; its context and its size in CSS pixels. */
function prepare(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  context.font = "12px sans-serif";
  return { context, width, height };
}

function line(context, points, color, width) {
  context.beginPath();
  points.forEach(([x, y]) => context.lineTo(x, y));
  context.strokeStyle = color;
  context.lineWidth = width;
  context.stroke();
}

function dots(context, points, color, radius) {
  context.fillStyle = color;
  for (const [x, y] of points) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }
}

/** From (u, v) to pixels of the map, and back. */
function scales({ u, v }, width, height) {
  const x = value => (value - u[0]) / (u[1] - u[0]) * width;
  const y = value => (v[1] - value) / (v[1] - v[0]) * height;
  const back = (px, py) => [u[0] + px / width * (u[1] - u[0]), v[1] - py / height * (v[1] - v[0])];
  return { x, y, back };
}

function drawMap(canvas, loss, runs, colors) {
  const { context, width, height } = prepare(canvas);
  const { x, y, back } = scales(loss, width, height);
  const cell = 3;
  const highest = Math.max(loss.loss([loss.u[1], loss.v[0]]), loss.loss([loss.u[1], loss.v[1]]));
  context.fillStyle = colors.text;
  for (let px = 0; px < width; px += cell) {
    for (let py = 0; py < height; py += cell) {  // darker bands are higher
      const depth = Math.log10(loss.loss(back(px, py)) / highest + 1e-3) / 3 + 1;
      context.globalAlpha = Math.max(0, Math.round(10 * depth) / 10) * 0.3;
      context.fillRect(px, py, cell, cell);
    }
  }
  context.globalAlpha = 1;
  context.fillText("★ flattest", x(0) - 5, y(0) + 4);
  context.fillText("u, flat →", width - 60, height - 8);
  context.fillText("v, sharp ↑", 6, 16);
  for (const { path, color, width: thick } of runs) {
    // what leaves the map by far is cut, or a canvas draws nothing
    const points = path.map(([u, v]) => [x(u), y(v)].map(p => Math.max(-1e4, Math.min(1e4, p))));
    line(context, points, color, thick / 2);
    dots(context, points, color, thick);
  }
  const [start] = runs[0].path;
  dots(context, [[x(start[0]), y(start[1])]], colors.handle, 9);
}

/** One curve a run over log(1 + step). `log` is for the vertical axis. */
function drawChart(canvas, title, runs, value, colors, log) {
  const { context, width, height } = prepare(canvas);
  const scale = log ? z => Math.log10(Math.max(z, 1e-12)) : z => z;
  const curves = runs.map(({ path }) => path.map(theta => scale(value(theta))));
  // a run that diverges must not flatten the other one
  const first = Math.max(...curves.map(curve => curve[0]));
  const top = Math.min(Math.max(...curves.flat()), first + (log ? 2 : Math.abs(first)));
  const bottom = Math.min(...curves.flat());
  const span = Math.max(top - bottom, 1e-3);
  const x = step => 6 + Math.log1p(step) / Math.log1p(STEPS) * (width - 12);
  const y = z => 24 + Math.max(-1, (top - z) / span) * (height - 44);
  context.fillStyle = colors.text;
  const label = z => log ? `1e${z.toFixed(0)}` : z.toFixed(2);
  context.fillText(`${title}, ${label(bottom)} to ${label(top)}`, 6, 14);
  context.fillText("0", 2, height - 4);
  for (const step of [1, 10, 100]) {
    context.fillText(step, x(step) - 4, height - 4);
  }
  context.fillText("step", width - 30, height - 4);
  curves.forEach((curve, i) =>
    line(context, curve.map((z, step) => [x(step), y(z)]), runs[i].color, runs[i].width));
}

// ---------------------------------------------------------------------------- the controls
const WIDGET = `
  <p class="ire-legend"><span class="gd">●</span> gradient descent <span class="ire">●</span> IRE
    <label>Loss <select></select></label> <button type="button">Reset</button></p>
  <canvas class="map" tabindex="0" role="img" aria-label="The valley from above. Drag the starting
    point, or move it with the arrow keys; with Shift in small steps."></canvas>
  <label>η <input class="eta" type="range" min="0.02" max="2.5" step="0.01"> <output></output></label>
  <label>κ <input class="kappa" type="range" min="0" max="4.5" step="0.005"> <output></output></label>
  <p class="ire-limits" aria-live="polite"></p>
  <canvas class="chart trace" role="img" aria-label="Trace of the Hessian at each step"></canvas>
  <canvas class="chart loss" role="img" aria-label="Loss at each step"></canvas>`;

function number(x) {
  return x === Infinity ? "∞" : x >= 1000 ? x.toFixed(0) : x.toPrecision(3);
}

function outcome(path) {
  const [u, v] = path.at(-1);
  return path.length <= STEPS ? `diverges, in ${path.length - 1} steps`
    : `ends at (${u.toFixed(3)}, ${v.toFixed(3)})`;
}

/** Turns one <div> into the valley. Its state is what the reader may change. */
function build(box) {
  const inside = document.createElement("div");
  inside.innerHTML = WIDGET;
  box.prepend(inside);
  box.classList.add("ire-alive");  // the style sheet hides the figure that stood for it
  const find = selector => inside.querySelector(selector);
  const [map, choice, eta, kappa] = [".map", "select", ".eta", ".kappa"].map(find);
  const state = {};
  for (const [key, { name }] of Object.entries(LOSSES)) {
    choice.add(new Option(name, key));
  }

  function reset() {
    const loss = LOSSES[choice.value];
    Object.assign(state, { start: loss.start, eta: loss.eta, kappa: loss.kappa });
    eta.value = state.eta;
    kappa.value = Math.log10(1 + state.kappa);  // the slider of kappa is logarithmic
    draw();
  }

  function draw() {
    const loss = LOSSES[choice.value];
    const style = name => getComputedStyle(find(name)).color;
    const colors = { text: style(".ire-limits"), handle: "#D55E00" };
    const runs = [
      { path: run(choice.value, state.start, state.eta, 0), color: style(".gd"), width: 3 },
      { path: run(choice.value, state.start, state.eta, state.kappa), color: style(".ire"), width: 2 },
    ];
    eta.nextElementSibling.value = number(state.eta);
    kappa.nextElementSibling.value = number(state.kappa);
    const limit = 2 / loss.sharpest(state.start);
    const most = loss.kappaMax(state.eta, state.start);
    const overEta = state.eta > limit ? "over" : state.eta === limit ? "at" : "under";
    const overKappa = state.kappa > most ? "over" : "under";
    find(".ire-limits").innerHTML =
      `At the start (${state.start.map(x => x.toPrecision(3)).join(", ")}):
       η is <b class="${overEta}">${overEta}</b> its limit 2 / λ = ${number(limit)},
       κ <b class="${overKappa}">${overKappa}</b> its own, κ_max = ${most > 0 ? number(most) : "none"}.
       Gradient descent ${outcome(runs[0].path)}; IRE ${outcome(runs[1].path)}.`;
    drawMap(map, loss, runs, colors);
    drawChart(find(".trace"), "Tr(H)", runs, loss.trace, colors, false);
    drawChart(find(".chart.loss"), "loss", runs, loss.loss, colors, true);
  }

  function moveTo([u, v]) {
    const loss = LOSSES[choice.value];
    const clamp = (x, [low, high]) => Math.max(low, Math.min(high, x));
    state.start = [clamp(u, loss.u), clamp(v, loss.v)];
    draw();
  }

  function drag(event) {
    const { left, top, width, height } = map.getBoundingClientRect();
    const { back } = scales(LOSSES[choice.value], width, height);
    moveTo(back(event.clientX - left, event.clientY - top));
  }

  map.addEventListener("pointerdown", event => {
    state.dragging = true;
    drag(event);
  });
  addEventListener("pointermove", event => state.dragging && drag(event));
  addEventListener("pointerup", () => { state.dragging = false; });
  addEventListener("pointercancel", () => { state.dragging = false; });
  map.addEventListener("keydown", event => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) {
      return;
    }
    event.preventDefault();  // the page would scroll
    const { u, v } = LOSSES[choice.value];
    const part = event.shiftKey ? 500 : 50;
    moveTo([u, v].map(([low, high], i) => state.start[i] + way[i] * (high - low) / part));
  });
  eta.addEventListener("input", () => { state.eta = Number(eta.value); draw(); });
  kappa.addEventListener("input", () => { state.kappa = 10 ** kappa.value - 1; draw(); });
  choice.addEventListener("change", reset);
  find("button").addEventListener("click", reset);
  addEventListener("resize", draw);
  // the theme's switch between light and dark
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  reset();
}

addEventListener("DOMContentLoaded", () => document.querySelectorAll(".ire-valley").forEach(build));
