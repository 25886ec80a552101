// A valley to play with: gradient descent and IRE on two parameters theta = (u, v).
// Each <div class="ire-valley"> becomes one. tests/test_book.py holds the arithmetic to toy/valley.py.
"use strict";

// ------------------------------------------------------------------------------ the losses
// loss and gradient; h: the Gauss-Newton diagonal, by which IRE tells flat from sharp; sharpest and
// kappaMax: they give the limits of eta and kappa at the start; u and v: what the map shows; star:
// the name of (0, 0); chart: what is shown at each step; end: how a run ended, in words.
const LOSSES = {
  valley: {
    loss: ([u, v]) => (1 + u * u) * v * v / 2,
    gradient: ([u, v]) => [u * v * v, (1 + u * u) * v],
    h: ([u, v]) => [u * u * v * v / (1 + u * u), 1 + u * u],
    sharpest: ([u]) => 1 + u * u,
    kappaMax: (eta, [, v]) => 2 / (eta * v * v) - 1,
    start: [1, 0.01], u: [-0.4, 1.2], v: [-0.032, 0.032], tick: 0.01, star: "flattest minimum",
    chart: { name: "Tr(H), where less is flatter", value: ([u]) => 1 + u * u },
    end: path => `u ends at ${path.at(-1)[0].toFixed(3)}`,
    note: "The paper's valley, (1 + u²) v² / 2. The smaller v is, the larger κ may be.",
  },
  quadratic: {
    loss: ([u, v]) => (0.04 * u * u + 2 * v * v) / 2,
    gradient: ([u, v]) => [0.04 * u, 2 * v],
    h: () => [0.04, 2],
    sharpest: () => 2,
    kappaMax: eta => 2 / (eta * 0.04) - 1,
    start: [1, 0.5], u: [-1.2, 1.2], v: [-0.8, 0.8], tick: 0.4, star: "minimum",
    chart: { name: "distance to the minimum (log)", value: theta => Math.hypot(...theta), log: true },
    end: path => `arrives ${after(path, theta => Math.hypot(...theta) < 0.01)}`,
    note: `A quadratic, (0.04 u² + 2 v²) / 2. The curvature is the same everywhere, so both limits
      are exact.`,
  },
  curved: {
    loss: ([u, v]) => (v - u * u / 2) ** 2 / 2,
    gradient: ([u, v]) => [-u * (v - u * u / 2), v - u * u / 2],
    h: ([u]) => [u * u, 1],
    sharpest: ([u]) => 1 + u * u,
    // the wall leans, so that u has a share in the sharp direction
    kappaMax: (eta, [u]) => (2 / eta - 1 - u * u) / Math.min(u * u, 1),
    start: [0.9, 0.8], u: [-0.4, 1.6], v: [-0.3, 1.2], tick: 0.4, star: "flattest minimum",
    chart: { name: "loss (log)", value: theta => LOSSES.curved.loss(theta), log: true },
    end: path => `on the floor ${after(path, theta => LOSSES.curved.loss(theta) < 1e-8)}`,
    note: `A curved valley, (v − u²/2)² / 2. The floor bends, so a longer step along u also climbs
      the wall.`,
  },
};

// The buttons. The run of `kappa` is the one that the slider moves; `others` stand beside it.
const SCENES = {
  "gradient descent stalls": {
    loss: "valley", eta: 1, kappa: 0, others: [],
    note: "The walls limit η to 1. At this limit gradient descent hardly moves along the floor.",
  },
  "IRE moves on": {
    loss: "valley", eta: 1, kappa: 9000, others: [90, 900],
    note: "IRE takes 1 + κ times longer steps along u. With κ = 9000 it reaches the flattest minimum.",
  },
  "too far": {
    loss: "valley", eta: 1, kappa: 20000, others: [],
    note: "κ is over its limit: each step along u overshoots by more than the last, and IRE diverges.",
  },
  "a quadratic": { loss: "quadratic", eta: 0.9, kappa: 20, others: [] },
  "a curved valley": {
    loss: "curved", eta: 0.5, kappa: 2, others: [],
    note: "IRE loses here, because the floor bends: a longer step along u also climbs the wall.",
  },
};
const STEPS = 300;

/** true where it is flat: the flatter of the two coordinates. */
function mask(curvature) {
  return curvature.map(x => x <= Math.min(...curvature));
}

/** The path of (u, v), cut where it has diverged; kappa = 0 is gradient descent. */
function run(loss, start, eta, kappa) {
  const { gradient, h } = LOSSES[loss];
  const path = [start];
  let flat;
  while (path.length <= STEPS && Math.max(...path.at(-1).map(Math.abs)) < 1e3) {
    const old = path.at(-1);
    if ((path.length - 1) % 10 === 0) {  // a new mask
      flat = mask(h(old));
    }
    const g = gradient(old);
    const base = old.map((x, i) => x - eta * g[i]);
    path.push(base.map((x, i) => flat[i] ? x + kappa * (x - old[i]) : x));
  }
  return path;
}

/** From which step on all points of a path are `there`. */
function after(path, there) {
  const steps = path.findLastIndex(theta => !there(theta)) + 1;
  return steps < path.length ? `after ${steps} steps` : `not in ${STEPS} steps`;
}

// -------------------------------------------------------------------------------- drawing
const MARGIN = { left: 50, right: 10, top: 24, bottom: 38 };  // CSS pixels around the frame of a plot

/** A canvas as sharp as the screen, and its scales; u and v: [lowest, highest]. */
function prepare(canvas, { u, v }, color) {
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  context.font = "13px sans-serif";
  context.fillStyle = color;
  return { context, ...scales({ u, v }, width, height) };
}

/** From values to pixels, and back; the frame inside the axes. */
function scales({ u, v }, width, height) {
  const [left, top] = [MARGIN.left, MARGIN.top];
  const [inner, tall] = [width - left - MARGIN.right, height - top - MARGIN.bottom];
  const x = value => left + (value - u[0]) / (u[1] - u[0]) * inner;
  const y = value => top + (v[1] - value) / (v[1] - v[0]) * tall;
  const back = (px, py) =>
    [u[0] + (px - left) / inner * (u[1] - u[0]), v[1] - (py - top) / tall * (v[1] - v[0])];
  return { x, y, back, left, top, right: left + inner, bottom: top + tall };
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

/** Frame, names and numbers of the axes: [value, text]. From then on only what is inside is drawn. */
function drawAxes({ context, x, y, left, right, top, bottom }, xName, yName, xTicks, yTicks) {
  context.fillText(yName, 4, 15);
  context.textAlign = "right";
  yTicks.forEach(([value, text]) => context.fillText(text, left - 6, y(value) + 4));
  context.textAlign = "center";
  xTicks.forEach(([value, text]) => context.fillText(text, x(value), bottom + 16));
  context.fillText(xName, (left + right) / 2, bottom + 33);
  context.beginPath();
  context.rect(left, top, right - left, bottom - top);
  context.strokeStyle = "#888";
  context.stroke();
  context.clip();
}

/** The multiples of `step` in [low, high]. */
function ticks([low, high], step) {
  const first = Math.ceil(low / step);
  const count = Math.floor(high / step) - first + 1;
  return Array.from({ length: Math.max(count, 0) }, (_, i) => Number(((first + i) * step).toFixed(6)));
}

function drawMap(canvas, loss, runs, color) {
  const plot = prepare(canvas, loss, color);
  const { context, x, y, back, left, right, top, bottom } = plot;
  const stretch = Math.round((y(0) - y(1)) / (x(1) - x(0)));
  const [start] = runs[0].path;
  const [u, v] = mask(loss.h(start)).map(flat => flat ? "flat" : "sharp");
  const drawn = stretch > 1 ? `, drawn ${stretch} times as large as u` : "";
  drawAxes(plot, `u: the mask calls it ${u}`, `v: ${v}${drawn}`,
    ticks(loss.u, 0.5).map(z => [z, z]), ticks(loss.v, loss.tick).map(z => [z, z]));
  const cell = 3;
  const highest = Math.max(loss.loss([loss.u[1], loss.v[0]]), loss.loss([loss.u[1], loss.v[1]]));
  for (let px = left; px < right; px += cell) {
    for (let py = top; py < bottom; py += cell) {  // darker bands are higher
      const depth = Math.log10(loss.loss(back(px, py)) / highest + 1e-3) / 3 + 1;
      context.globalAlpha = Math.max(0, Math.round(10 * depth) / 10) * 0.3;
      context.fillRect(px, py, cell, cell);
    }
  }
  context.globalAlpha = 1;
  for (const { path, color, width } of runs) {
    // what leaves the map by far is cut, or a canvas draws nothing
    const points = path.map(([u, v]) => [x(u), y(v)].map(p => Math.max(-1e4, Math.min(1e4, p))));
    line(context, points, color, width / 2);
    dots(context, points, color, width);
  }
  context.fillStyle = color;
  context.fillText("★", x(0), y(0) + 5);
  context.fillText(loss.star, x(0), y(0) - 12);
  dots(context, [[x(start[0]), y(start[1])]], HANDLE, 9);
}

/** One curve a run over log(1 + step). `log` is for the vertical axis. */
function drawChart(canvas, { name, value, log }, runs, color) {
  const scale = log ? z => Math.log10(Math.max(z, 1e-12)) : z => z;
  const curves = runs.map(({ path }) => path.map(theta => scale(value(theta))));
  // a run that diverges must not flatten the other one
  const first = Math.max(...curves.map(curve => curve[0]));
  const top = Math.min(Math.max(...curves.flat()), first + (log ? 2 : first)) + 0.1;
  const v = [(log ? Math.min(...curves.flat()) : 1) - 0.1, top];
  const plot = prepare(canvas, { u: [0, Math.log1p(STEPS)], v }, color);
  const yTicks = ticks(v, log ? Math.ceil((v[1] - v[0]) / 4) : v[1] < 2.5 ? 0.5 : 1);
  drawAxes(plot, "step (log)", name, [0, 1, 10, 100].map(z => [Math.log1p(z), z]),
    yTicks.map(z => [z, log ? `1e${z}` : z]));
  curves.forEach((curve, i) => {
    const points = curve.map((z, step) => [plot.x(Math.log1p(step)), plot.y(z)]);
    line(plot.context, points, runs[i].color, runs[i].width);
  });
}

// ---------------------------------------------------------------------------- the controls
const HANDLE = "#D55E00";  // what the reader moves: the start, and the run of the slider's kappa
const COLORS = ["#2A8CCB", "#E69F00"];  // of the others
const WIDGET = `
  <p class="ire-buttons">${Object.keys(SCENES).map(x => `<button type="button">${x}</button>`).join("")}</p>
  <p class="ire-note" aria-live="polite"></p>
  <ul class="ire-legend"></ul>
  <canvas class="map" tabindex="0" role="img" aria-label="The valley from above. Drag the starting
    point, or move it with the arrow keys; with Shift in small steps."></canvas>
  <label>learning rate η = <output></output>
    <input class="eta" type="range" min="0" max="2.5" step="0.01"><span class="ire-scale"></span></label>
  <label>boost κ = <output></output>
    <input class="kappa" type="range" min="0" max="4.5" step="0.005"><span class="ire-scale"></span></label>
  <canvas class="chart" role="img" aria-label="Flatness, distance or loss at each step"></canvas>`;
const THROWN = ` η is over its limit at the start. So gradient descent is thrown to a flatter place,
  where η is under the limit.`;
const onSlider = kappa => Math.log10(1 + kappa);  // the slider of kappa is logarithmic

function number(x) {
  return x === Infinity ? "∞" : x >= 100 ? x.toFixed(0) : Number(x.toPrecision(3));
}

/** A slider with its number, its limit, and a scale that is red beyond the limit. */
function drawSlider(slider, value, limit, marks, position) {
  const [output, scale] = [slider.previousElementSibling, slider.nextElementSibling];
  const where = value > limit ? "over" : value === limit ? "at" : "under";
  const percent = x => `${100 * Math.min(1, position(x) / slider.max)}%`;
  slider.value = position(value);
  output.innerHTML =
    `${number(value)}, <b class="${where}">${where}</b> its limit ${number(limit)} (at the start)`;
  scale.style.setProperty("--limit", percent(limit));
  scale.innerHTML = marks.map(x => `<i style="left: ${percent(x)}">${x}</i>`).join("");
}

/** Turns one <div> into the valley. Its state is what the reader may change. */
function build(box) {
  const widget = document.createElement("div");
  widget.innerHTML = WIDGET;
  box.prepend(widget);
  box.classList.add("ire-alive");  // the style sheet hides the figure that stood for it
  const find = selector => widget.querySelector(selector);
  const [map, eta, kappa] = [".map", ".eta", ".kappa"].map(find);
  const buttons = widget.querySelectorAll("button");
  const state = {};

  function change(what) {
    Object.assign(state, what);
    draw();
  }

  function show(scene) {
    const { start, note } = LOSSES[scene.loss];
    change({ scene, start, note, ...scene });
  }

  // A change by hand: no button is pressed any more, and the note is on the loss.
  function move(what) {
    change({ scene: null, note: LOSSES[state.loss].note, ...what });
  }

  function draw() {
    const loss = LOSSES[state.loss];
    const color = getComputedStyle(widget).color;
    const colors = [color, ...COLORS.slice(0, state.others.length), HANDLE];
    // with κ = 0 the run of the slider would hide that of gradient descent
    const kappas = state.kappa > 0 ? [0, ...state.others, state.kappa] : [0];
    const runs = kappas.map((k, i) => ({
      name: i ? `IRE, κ = ${number(k)}` : "gradient descent",
      path: run(state.loss, state.start, state.eta, k),
      color: colors[i],
      width: i ? 2 : 3,
    }));
    const limit = theta => 2 / loss.sharpest(theta);
    const thrown = state.eta > limit(state.start) && state.eta < limit(runs[0].path.at(-1));
    for (const button of buttons) {
      button.setAttribute("aria-pressed", SCENES[button.textContent] === state.scene);
    }
    find(".ire-note").textContent = state.note + (thrown ? THROWN : "");
    find(".ire-legend").innerHTML = runs.map(({ name, path, color }) => {
      const end = path.length > STEPS ? loss.end(path) : `diverges in ${path.length - 1} steps`;
      return `<li><b style="color: ${color}">●</b> ${name}: ${end}</li>`;
    }).join("");
    drawSlider(eta, state.eta, limit(state.start), [0, 0.5, 1, 1.5, 2, 2.5], x => x);
    const most = Math.max(0, loss.kappaMax(state.eta, state.start));
    drawSlider(kappa, state.kappa, most, [0, 10, 100, 1000, 10000], onSlider);
    drawMap(map, loss, runs, color);
    drawChart(find(".chart"), loss.chart, runs, color);
  }

  function moveTo([u, v]) {
    const loss = LOSSES[state.loss];
    const clamp = (x, [low, high]) => Math.max(low, Math.min(high, x));
    move({ start: [clamp(u, loss.u), clamp(v, loss.v)] });
  }

  function drag(event) {
    const { left, top, width, height } = map.getBoundingClientRect();
    const { back } = scales(LOSSES[state.loss], width, height);
    if (event.buttons) {
      moveTo(back(event.clientX - left, event.clientY - top));
    }
  }

  for (const button of buttons) {
    button.addEventListener("click", () => show(SCENES[button.textContent]));
  }
  map.addEventListener("pointerdown", drag);
  map.addEventListener("pointermove", drag);
  map.addEventListener("keydown", event => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) {
      return;
    }
    event.preventDefault();  // the page would scroll
    const { u, v } = LOSSES[state.loss];
    const part = event.shiftKey ? 500 : 50;
    moveTo([u, v].map(([low, high], i) => state.start[i] + way[i] * (high - low) / part));
  });
  eta.addEventListener("input", () => move({ eta: Number(eta.value) }));
  kappa.addEventListener("input", () => move({ kappa: 10 ** kappa.value - 1 }));
  addEventListener("resize", draw);
  // the theme's switch between light and dark
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  show(SCENES["IRE moves on"]);
}

addEventListener("DOMContentLoaded", () => document.querySelectorAll(".ire-valley").forEach(build));
