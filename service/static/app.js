// The page: pictures in a row, one shown at a time; the service is asked once per picture at a
// low threshold, and everything after that (score, classes) is chosen here.

import { Problem, detect, explain, models, readiness } from "./api.js";
import { annotated } from "./drawing.js";
import { lowestScore, shown, state } from "./state.js";
import {
  chosenAnswer,
  point,
  render,
  renderBoxes,
  renderResult,
  renderScore,
  renderStrip,
} from "./view.js";

const PATIENCE = 60; // seconds of being refused before a person is asked whether to go on

const $ = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// ---- asking the service

let asking = false;

async function askForAll() {
  if (asking || !state.model) return;
  asking = true;
  for (let next; (next = state.pictures.find(isWaiting)); ) await ask(next);
  asking = false;
}

const isWaiting = (picture) => picture.status === "waiting" && state.pictures.includes(picture);

async function ask(picture) {
  const model = state.model;
  const asked = performance.now();
  while (isWaiting(picture)) {
    update(picture, { status: "sending", problem: null, note: "Looking…" });
    const started = performance.now();
    try {
      const answer = await detect(picture.file, { model, threshold: lowestScore() });
      if (model !== state.model) return update(picture, { status: "waiting" });
      update(picture, { status: "done", answer, seconds: (performance.now() - started) / 1000 });
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      update(picture, { problem });
      if (problem.status === 0) reconnect();
      if (problem.retryAfter === null || performance.now() - asked > 1000 * PATIENCE) {
        return update(picture, { status: "failed" });
      }
      await countdown(picture, Math.max(1, problem.retryAfter));
    }
  }
}

async function countdown(picture, seconds) {
  const [heading] = explain(picture.problem, picture.file);
  for (let left = Math.ceil(seconds); left > 0; left -= 1) {
    update(picture, { note: `${heading}. Trying again in ${left} s…` });
    await pause(1);
  }
  update(picture, { status: "waiting" });
}

function update(picture, change) {
  Object.assign(picture, change);
  renderStrip();
  if (picture === state.current) render();
}

// ---- pictures in

function add(files) {
  const before = state.pictures.length;
  for (const file of files) {
    const url = URL.createObjectURL(file);
    const picture = { file, url, image: new Image(), status: "waiting", note: "Waiting…" };
    picture.image.onload = () => picture === state.current && render();
    picture.image.src = url;
    state.pictures.push(picture);
  }
  if (state.pictures.length > before) show(state.pictures[before]);
  askForAll();
}

function show(picture) {
  Object.assign(state, { current: picture, active: null });
  const view = picture ? "picture" : "empty";
  const focusIsLost = picture && $("empty").contains(document.activeElement);
  document.body.dataset.view = view;
  $("empty").hidden = view !== "empty";
  $("stage").hidden = $("panel").hidden = view === "empty";
  if (focusIsLost) $("stage").focus();
  renderStrip();
  render();
}

function startOver() {
  for (const picture of state.pictures) URL.revokeObjectURL(picture.url);
  Object.assign(state, { pictures: [], score: null });
  state.hidden.clear();
  show(null);
  document.querySelector("#empty [data-choose]").focus();
}

async function addSample() {
  const response = await fetch($("sample").querySelector("img").src).catch(() => null);
  if (!response?.ok) return toast("The sample did not load: the service does not answer.");
  add([new File([await response.blob()], "sample.jpg", { type: "image/jpeg" })]);
}

/** Files of a drop or a paste. A folder is no picture, whatever its name. */
function filesOf(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const isFolder = (item) => item.webkitGetAsEntry?.()?.isDirectory ?? false;
  if (items.some(isFolder)) toast("Folders are left out: drop the pictures in them.");
  return items.filter((item) => !isFolder(item)).map((item) => item.getAsFile()).filter(Boolean);
}

// ---- results out

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const stem = (picture) => picture.file.name.replace(/\.[^.]+$/, "");

async function savePicture() {
  const { current } = state;
  const options = { width: current.answer.image.width, labels: $("labels").checked };
  const blob = await annotated(current.image, shown(current), options);
  if (blob) save(blob, `${stem(current)}-boxes.png`);
  else toast("The picture is too large for this browser to draw in full.");
}

function saveJson() {
  const text = JSON.stringify(chosenAnswer(state.current), null, 2);
  save(new Blob([text], { type: "application/json" }), `${stem(state.current)}.json`);
}

async function copy({ currentTarget: button }) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    toast("Copied");
  } catch {
    // Browsers keep the clipboard from pages without HTTPS; the selection is one key from it.
    getSelection().selectAllChildren(source);
    toast("Selected: press Ctrl+C to copy");
  }
}

let toasting = 0;

function toast(text) {
  $("toast").textContent = text;
  clearTimeout(toasting);
  toasting = setTimeout(() => ($("toast").textContent = ""), 4000);
}

// ---- wiring

function wireInput() {
  for (const button of document.querySelectorAll("[data-choose]")) {
    button.addEventListener("click", () => $("files").click());
  }
  $("files").addEventListener("change", ({ target }) => {
    add([...target.files]);
    target.value = "";
  });
  $("sample").addEventListener("click", addSample);
  document.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (files.length) add(files);
  });
  let depth = 0;
  const veil = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dragging", depth > 0);
  };
  addEventListener("dragenter", () => veil(1));
  addEventListener("dragleave", () => veil(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    veil(-depth);
    const files = filesOf(event.dataTransfer);
    if (files.length) add(files);
    else toast("There is no file in what was dropped: save the picture first.");
  });
}

function wireResult() {
  $("score").addEventListener("input", ({ target }) => setScore(Number(target.value)));
  $("reset").addEventListener("click", () => setScore(null));
  $("labels").addEventListener("change", () => renderBoxes(state.current));
  $("classes").addEventListener("change", ({ target }) => {
    state.hidden[target.checked ? "delete" : "add"](target.closest("li").dataset.class);
    renderResult();
  });
  $("boxes").addEventListener("pointermove", ({ offsetX, offsetY, currentTarget }) => {
    const scale = state.current.image.naturalWidth / currentTarget.clientWidth;
    point(smallestAt(offsetX * scale, offsetY * scale));
  });
  $("boxes").addEventListener("pointerleave", () => point(null));
  $("strip").addEventListener("click", ({ target }) => {
    const item = target.closest("li");
    if (item) show(state.pictures[[...$("strip").children].indexOf(item)]);
  });
  $("retry").addEventListener("click", () => {
    update(state.current, { status: "waiting" });
    askForAll();
  });
  $("clear").addEventListener("click", startOver);
  $("save-picture").addEventListener("click", savePicture);
  $("save-json").addEventListener("click", saveJson);
  for (const button of document.querySelectorAll("[data-copy]")) button.onclick = copy;
  addEventListener("keydown", moveByKey);
  addEventListener("resize", render);
}

function setScore(score) {
  state.score = score;
  renderScore();
  renderResult();
}

function smallestAt(x, y) {
  const area = ({ box }) => (box.x2 - box.x1) * (box.y2 - box.y1);
  const around = ({ box }) => box.x1 <= x && x <= box.x2 && box.y1 <= y && y <= box.y2;
  return shown(state.current).filter(around).sort((a, b) => area(a) - area(b))[0] ?? null;
}

/** Arrow keys go through the pictures, wherever they have no other meaning. */
function moveByKey(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !state.current || event.target.matches("input, select, pre")) return;
  const next = state.pictures[state.pictures.indexOf(state.current) + step];
  if (!next) return;
  show(next);
  if (event.target.closest("#strip")) $("strip").querySelector("[aria-current=true]").focus();
}

// ---- start

function status(name, text) {
  $("status").dataset.state = name;
  $("status").lastElementChild.textContent = text;
}

async function untilReady() {
  for (;;) {
    try {
      return await readiness();
    } catch (problem) {
      if (problem.status === 0) status("down", "The service does not answer; still trying");
      else status("loading", problem.detail || "Loading the model…");
      await pause(Math.max(1, Math.min(5, problem.retryAfter ?? 1.5)));
    }
  }
}

let reconnecting = false;

/** Say that the service is gone, until it answers again. */
async function reconnect() {
  if (reconnecting) return;
  reconnecting = true;
  const { device } = await untilReady();
  status("ready", `Ready on ${device}`);
  reconnecting = false;
}

function choose(model) {
  Object.assign(state, { model, score: null, active: null });
  state.hidden.clear();
  $("model-name").textContent = state.models.length > 1 ? "" : titleOf(model);
  const [last, ...others] = [...model.classes].reverse();
  const names = model.classes.length > 8 ? `${model.classes.length} classes` : null;
  const finds = names ?? [others.reverse().join(", "), last].filter(Boolean).join(" and ");
  $("finds").textContent = `${model.name} finds ${finds}.`;
  const { metrics } = model;
  $("quality").textContent = metrics
    ? `AP50 ${metrics.ap50.toFixed(2)}, AP ${metrics.ap.toFixed(2)} on ${metrics.dataset} ${metrics.split}`
    : "";
  for (const picture of state.pictures) update(picture, { status: "waiting", answer: null });
  askForAll();
}

const titleOf = ({ name, version }) => `${name}, version ${version}`;

function offer(found) {
  state.models = found;
  $("model").hidden = found.length < 2;
  $("model").replaceChildren(...found.map((model) => new Option(titleOf(model))));
  $("model").onchange = ({ target }) => choose(found[target.selectedIndex]);
  choose(found[0]);
}

async function start() {
  const url = new URL("v1/detect", document.baseURI).href;
  $("hello").textContent = `curl -F file=@cells.jpg ${url}`;
  wireInput();
  wireResult();
  for (;;) {
    const ready = await untilReady();
    try {
      offer(await models());
      $("status").title = ready.fallback ?? "";
      return status("ready", `Ready on ${ready.device}`);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      status("loading", problem.message);
      await pause(2);
    }
  }
}

start();
