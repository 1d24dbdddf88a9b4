"use strict";
const page = JSON.parse(document.getElementById("page-data").textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/* Samples: what is shown is this state, everything else follows from it. */
const state = { setting: 0, prompt: 0, seed: 0, left: 0, right: page.right };

function pictureOf(source, prompt = state.prompt, seed = state.seed) {
  return page.pictures[page.sources[source].cells[`${state.setting}/${prompt}/${seed}`]];
}

function setPicture(image, picture, text, address = "uri") {
  image.hidden = !picture;
  image.alt = text;
  if (picture) {
    if (image.getAttribute("src") !== picture[address]) image.src = picture[address];
    image.classList.toggle("small", picture.small);
  }
}

/* A picture that lies beside the page is gone when the page alone was moved. */
function tellOfMissing(image, note) {
  image.addEventListener("error", () => {
    note.textContent = `${image.getAttribute("src")} is not beside this page`;
    note.hidden = false;
    image.hidden = true;
  });
}

function show() {
  const prompt = page.prompts[state.prompt];
  for (const side of ["left", "right"]) {
    const { label } = page.sources[state[side]];
    const picture = pictureOf(state[side]);
    const absent = document.querySelector(`.absent.${side}`);
    absent.textContent = "no such picture";
    absent.hidden = Boolean(picture);
    setPicture(byId(side), picture, `${label}: ${prompt.text}, seed ${page.seeds[state.seed]}`);
    byId(`${side}-label`).textContent = label;
    const save = byId(`${side}-save`);
    save.hidden = !picture;
    if (picture) {
      save.textContent = `full size, ${label}`;
      save.href = picture.uri;
      save.download = `${label}, ${prompt.text}, seed ${page.seeds[state.seed]}.webp`.replace(/[\\/:*?"<>|]/g, "_");
    }
    byId(`${side}-source`).value = state[side];
  }
  byId("setting").value = state.setting;
  byId("prompt").textContent = prompt.text;
  const example = prompt.example ? `, a caption of ${prompt.example}` : "";
  byId("details").textContent = `seed ${page.seeds[state.seed]}, ${page.settings[state.setting]}${example}`;
  for (const button of document.querySelectorAll("#chooser button")) {
    const [row, column] = [Number(button.dataset.prompt), Number(button.dataset.seed)];
    const chosen = row === state.prompt && column === state.seed;
    setPicture(button.firstChild, pictureOf(state.right, row, column), "", "thumbnail");
    button.setAttribute("aria-pressed", chosen);
    button.tabIndex = chosen ? 0 : -1;
    button.parentElement.classList.toggle("chosen", row === state.prompt);
  }
  for (const [index, button] of [...byId("strip").children].entries()) {
    setPicture(button.firstChild, pictureOf(index), "", "thumbnail");
    button.setAttribute("aria-pressed", index === state.right);
  }
}

function change(values) {
  Object.assign(state, values);
  show();
  history.replaceState(null, "", `#${new URLSearchParams(namesOfState())}`);
}

/* What an address says of the state: by name, so that it holds for a page of other prompts too. */
const namesOfState = () => ({
  prompt: page.prompts[state.prompt].text,
  seed: page.seeds[state.seed],
  setting: page.settings[state.setting],
  left: page.sources[state.left].label,
  right: page.sources[state.right].label,
});

function followAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const lists = {
    prompt: page.prompts.map(({ text }) => text),
    seed: page.seeds.map(String),
    setting: page.settings,
    left: page.sources.map(({ label }) => label),
    right: page.sources.map(({ label }) => label),
  };
  for (const [key, list] of Object.entries(lists)) {
    const found = list.indexOf(asked.get(key));
    if (found >= 0) state[key] = found;
  }
  show();
}

const step = (key, count, by) => change({ [key]: (state[key] + by + count) % count });

function fillSelect(id, labels, key) {
  byId(id).append(...labels.map((label, index) => make("option", { value: index, textContent: label })));
  byId(id).addEventListener("change", () => change({ [key]: Number(byId(id).value) }));
}

function buildChooser() {
  const chooser = byId("chooser");
  chooser.append(...page.prompts.map(({ text }, prompt) =>
    make("div", { className: "row" },
      make("p", { dir: "auto", textContent: text }),
      ...page.seeds.map((value, seed) => {
        const button = make("button", { type: "button" }, make("img"));
        Object.assign(button.dataset, { prompt, seed });
        button.setAttribute("aria-label", `${text}, seed ${value}`);
        button.addEventListener("click", () => change({ prompt, seed }));
        return button;
      }))));
  chooser.addEventListener("keydown", (event) => {
    const next = neighbour([...chooser.querySelectorAll(".row:not([hidden]) button")], document.activeElement, event.key);
    if (!next) return;
    event.preventDefault();
    next.click();
    next.focus();
  });
}

/* The button that an arrow key leads to: the next one in order, or the nearest in the row above or below. */
function neighbour(buttons, from, key) {
  const at = buttons.indexOf(from);
  if (key === "ArrowRight") return buttons[at + 1];
  if (key === "ArrowLeft") return buttons[at - 1];
  if (key !== "ArrowUp" && key !== "ArrowDown") return undefined;
  const sign = key === "ArrowDown" ? 1 : -1;
  const here = from.getBoundingClientRect();
  const distance = (button) => {
    const box = button.getBoundingClientRect();
    const down = sign * (box.top - here.top);
    return down < here.height ? Infinity : 100 * down + Math.abs(box.left - here.left);
  };
  const near = buttons.reduce((best, button) => (distance(button) < distance(best) ? button : best));
  return distance(near) < Infinity ? near : undefined;
}

function buildSearch() {
  const field = byId("search");
  byId("search-field").hidden = page.prompts.length < 9;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    const rows = [...document.querySelectorAll("#chooser .row")];
    rows.forEach((row, prompt) => {
      const text = page.prompts[prompt].text.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
    const left = rows.filter((row) => !row.hidden).length;
    byId("found").textContent = field.value ? `${left} of ${rows.length}` : "";
  });
}

function buildStrip() {
  byId("strip").hidden = page.sources.length < 3;
  byId("strip").append(...page.sources.map(({ label }, right) => {
    const button = make("button", { type: "button" }, make("img"), make("span", { dir: "auto", textContent: label }));
    button.addEventListener("click", () => change({ right }));
    return button;
  }));
}

function buildSlider() {
  const [frame, split] = [byId("frame"), byId("split")];
  const follow = () => frame.style.setProperty("--split", `${split.value}%`);
  const move = (event) => {
    const box = frame.getBoundingClientRect();
    split.value = (100 * (event.clientX - box.left)) / box.width;
    follow();
  };
  split.addEventListener("input", follow);
  frame.addEventListener("pointerdown", (event) => {
    frame.setPointerCapture(event.pointerId);
    split.focus({ preventScroll: true, focusVisible: false });
    move(event);
    event.preventDefault();
  });
  frame.addEventListener("pointermove", (event) => {
    if (frame.hasPointerCapture(event.pointerId)) move(event);
  });
  follow();
}

function listenToKeys() {
  const keys = {
    j: () => step("prompt", page.prompts.length, 1),
    k: () => step("prompt", page.prompts.length, -1),
    s: () => step("seed", page.seeds.length, 1),
    g: () => step("setting", page.settings.length, 1),
  };
  const on = byId("letter-keys");
  document.addEventListener("keydown", (event) => {
    if (!on.checked || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("select, input[type=search]")) return;
    keys[event.key]?.();
  });
}

/* Curves: the nearest logged step under the pointer, or the next one by arrow key. */
const { plot } = page;
const digits = (value) => {
  if (value === 0) return "0";
  const text = Math.abs(value) < 1e-4 ? value.toExponential(3) : value.toPrecision(4);
  return text.replace("+", "").replaceAll("-", "−");
};

function svg(tag, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return parent.appendChild(element);
}

function buildChart(figure, { steps, values, lines }) {
  const drawing = figure.querySelector("svg");
  const across = (step) => plot.left + ((plot.right - plot.left) * (step - steps[0])) / (steps[1] - steps[0]);
  const down = (value) => plot.bottom - ((plot.bottom - plot.top) * (value - values[0])) / (values[1] - values[0]);
  const cursor = svg("line", { class: "cursor", y1: plot.top, y2: plot.bottom, visibility: "hidden" }, drawing);
  const dots = [...drawing.querySelectorAll("polyline")].map((line) =>
    svg("circle", { class: `dot ${line.getAttribute("class")}`, r: 4, visibility: "hidden" }, drawing));
  const logged = [...new Set(lines.flatMap((line) => line.steps))].sort((one, other) => one - other);
  let position = logged.length - 1;

  const read = (at) => {
    position = Math.max(0, Math.min(logged.length - 1, at));
    const step = logged[position];
    figure.querySelector(".at").textContent = step.toLocaleString("en");
    cursor.setAttribute("x1", across(step));
    cursor.setAttribute("x2", across(step));
    cursor.setAttribute("visibility", "visible");
    lines.forEach((line, index) => {
      const found = line.steps.indexOf(step);
      dots[index].setAttribute("visibility", found < 0 ? "hidden" : "visible");
      figure.querySelectorAll(".now")[index].textContent = found < 0 ? "–" : digits(line.values[found]);
      if (found < 0) return;
      dots[index].setAttribute("cx", across(step));
      dots[index].setAttribute("cy", down(line.values[found]));
    });
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const pointed = ((event.clientX - box.left) * plot.width) / box.width;
    const distances = logged.map((step) => Math.abs(across(step) - pointed));
    read(distances.indexOf(Math.min(...distances)));
  });
  drawing.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    read(position + (event.key === "ArrowRight" ? 1 : -1));
  });
}

function buildLightbox() {
  const dialog = byId("lightbox");
  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("click", () => {
      const [shown, drawn] = [dialog.querySelector("img"), button.querySelector("img")];
      Object.assign(shown, { src: drawn.src, alt: drawn.alt });
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => {
    if (event.target.tagName !== "BUTTON") dialog.close();
  });
}

fillSelect("setting", page.settings, "setting");
fillSelect("left-source", page.sources.map(({ label }) => label), "left");
fillSelect("right-source", page.sources.map(({ label }) => label), "right");
for (const id of ["setting-field", "setting-hint"]) byId(id).hidden = page.settings.length < 2;
for (const id of ["left-field", "right-field"]) byId(id).hidden = page.sources.length < 3;
buildChooser();
buildSearch();
buildStrip();
buildSlider();
listenToKeys();
document.querySelectorAll(".chart").forEach((figure, index) => buildChart(figure, page.charts[index]));
buildLightbox();
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId("params-text").textContent);
    button.textContent = "Copied";
  });
}
for (const side of ["left", "right"]) tellOfMissing(byId(side), document.querySelector(`.absent.${side}`));
addEventListener("hashchange", followAddress);
followAddress();
