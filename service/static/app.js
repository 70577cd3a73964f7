// The page: a row of images, one shown at a time. Each image is one request at a low threshold;
// scores and classes are filtered here.

import { Problem, models, readiness } from "./api.js";
import { save, stem, toCsv, toJson } from "./downloads.js";
import { imagesOf } from "./files.js";
import { unlocked, wireKey } from "./key.js";
import { annotatedBlob, forget, lookAtAll } from "./images.js";
import { askAnew, askForAll, cancelAll, goOn, retryAll, wireQueue } from "./queue.js";
import { isUnfinished, shown, state, useModel } from "./state.js";
import {
  news, point, render, renderBoxes, renderChange, renderResult, renderScore, renderStrip, toast,
} from "./view.js";

const $ = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// ---- images in

function add(images) {
  if (!images.length) return;
  const first = state.images.length;
  for (const { file, name } of images) state.images.push({ file, name, status: "waiting" });
  show(state.images[first]);
  askForAll();
}

async function addFrom(transfer) {
  const { images, left } = await imagesOf(transfer);
  add(images);
  if (left) toast(`That was too much at once: ${left} images are left out.`);
  return images.length;
}

function show(image) {
  Object.assign(state, { current: image, active: null });
  const view = image ? "image" : "empty";
  const focusIsLost = image && $("empty").contains(document.activeElement);
  document.body.dataset.view = view;
  $("empty").hidden = view !== "empty";
  $("stage").hidden = $("panel").hidden = view === "empty";
  if (focusIsLost) $("stage").focus();
  renderStrip();
  render();
  lookAtAll(renderChange);
}

function startOver() {
  cancelAll();
  state.images.forEach(forget);
  Object.assign(state, { images: [], score: null });
  state.hidden.clear();
  show(null);
  document.querySelector("#empty [data-choose]").focus();
}

async function addSample() {
  const response = await fetch($("sample").querySelector("img").src).catch(() => null);
  if (!response?.ok) return toast("The sample did not load: the service does not answer.");
  const file = new File([await response.blob()], "sample.jpg", { type: "image/jpeg" });
  add([{ file, name: file.name }]);
}

// ---- results out

async function saveImage() {
  const { current } = state;
  $("save-image").disabled = true;
  const options = { width: current.answer.image.width, labels: $("labels").checked };
  const blob = await annotatedBlob(current, shown(current), options);
  if (blob) save(blob, `${stem(current)}-boxes.png`);
  else toast("The image is too large for this browser to draw in full.");
  render();
}

function saveText(text, type) {
  const { images, current } = state;
  const alone = images.length === 1;
  const content = text(images);
  const name = alone ? stem(current) : "detections";
  save(new Blob([content], { type: `${type};charset=utf-8` }), `${name}.${type.split("/")[1]}`);
}

async function copy({ currentTarget: button }) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    toast("Copied");
  } catch {
    // Browsers deny the clipboard to pages without HTTPS; the selected text can be copied by a key.
    getSelection().selectAllChildren(source);
    toast("Selected: press Ctrl+C to copy");
  }
}

// ---- wiring

function wireInput() {
  for (const button of document.querySelectorAll("[data-choose]")) {
    button.addEventListener("click", () => $("files").click());
  }
  $("files").addEventListener("change", ({ target }) => {
    add([...target.files].map((file) => ({ file, name: file.name })));
    target.value = "";
  });
  $("sample").addEventListener("click", addSample);
  document.addEventListener("paste", (event) => {
    if (!event.target.closest("dialog")) addFrom(event.clipboardData);
  });
  let depth = 0;
  const veil = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dragging", depth > 0);
  };
  addEventListener("dragenter", () => veil(1));
  addEventListener("dragleave", () => veil(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", async (event) => {
    event.preventDefault();
    veil(-depth);
    const count = await addFrom(event.dataTransfer);
    if (!count) toast("No image was in what was dropped: it takes JPEG, PNG and WebP files.");
  });
}

function wireResult() {
  $("score").addEventListener("input", ({ target }) => setScore(Number(target.value)));
  $("reset").addEventListener("click", () => {
    setScore(null);
    $("score").focus(); // The button is gone now.
  });
  $("labels").addEventListener("change", renderBoxes);
  $("tile").addEventListener("change", ({ target }) => {
    state.tile = target.checked;
    askAnew();
  });
  $("classes").addEventListener("change", ({ target }) => {
    state.hidden[target.checked ? "delete" : "add"](target.closest("li").dataset.class);
    renderResult();
  });
  $("every").addEventListener("click", () => {
    const names = [...$("classes").children].map((row) => row.dataset.class);
    const isAnyShown = names.some((name) => !state.hidden.has(name));
    for (const name of names) state.hidden[isAnyShown ? "add" : "delete"](name);
    renderResult();
  });
  $("boxes").addEventListener("pointermove", ({ offsetX, offsetY, currentTarget }) => {
    const width = state.current.answer?.image.width ?? 0;
    const scale = width / currentTarget.clientWidth;
    point(smallestAt(offsetX * scale, offsetY * scale));
  });
  $("boxes").addEventListener("pointerleave", () => point(null));
  $("strip").addEventListener("click", ({ target }) => {
    const item = target.closest("li");
    if (item) show(state.images[[...$("strip").children].indexOf(item)]);
  });
  $("clear").addEventListener("click", startOver);
  $("save-image").addEventListener("click", saveImage);
  $("save-json").addEventListener("click", () => saveText(toJson, "application/json"));
  $("save-csv").addEventListener("click", () => saveText(toCsv, "text/csv"));
  for (const button of document.querySelectorAll("[data-copy]")) button.onclick = copy;
  addEventListener("keydown", moveByKey);
  addEventListener("resize", render);
}

function wireAsking() {
  wireQueue({ changed, news, lost: reconnect, modelGone });
  const toStage = (action) => () => {
    action();
    $("stage").focus(); // The button is gone now, and the focus would be lost with it.
  };
  $("retry").addEventListener("click", toStage(retryAll));
  $("cancel").addEventListener("click", toStage(cancelAll));
  $("now").addEventListener("click", toStage(goOn));
  wireKey({ entered: unlock, forgotten: () => toast("The key is forgotten.") });
}

function changed(image) {
  renderChange(image);
  const { images } = state;
  if (images.length < 2 || !image || images.some(isUnfinished)) return;
  const failed = images.filter(({ status }) => status === "failed").length;
  news(`All ${images.length} images are through${failed ? `, ${failed} of them failed` : ""}.`);
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

/** Left and right select an image, up and down a detection. */
function moveByKey(event) {
  const { key, target } = event;
  if (!state.current || event.altKey || event.ctrlKey || event.metaKey) return;
  const row = target.closest?.("tbody tr");
  if (row) {
    const rows = [...row.parentElement.children];
    const at = rows.indexOf(row);
    const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: rows.length - 1 }[key];
    if (to !== undefined) {
      event.preventDefault();
      return moveFocus(row, rows[to]);
    }
  }
  const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (!step || target.closest?.("input, select, pre, dialog")) return;
  const next = state.images[state.images.indexOf(state.current) + step];
  if (!next) return;
  show(next);
  const thumbnail = $("strip").querySelector("[aria-current=true]");
  if (target.closest?.("#strip")) thumbnail.focus();
  thumbnail.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function moveFocus(from, to) {
  if (!to) return;
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

// ---- the service

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

/** Show that the service is unreachable, until it responds again. */
async function reconnect() {
  if (reconnecting) return;
  reconnecting = true;
  const ready = await untilReady();
  reconnecting = false;
  state.offline = false;
  sayReady(ready);
  await refresh();
  askForAll();
}

function sayReady({ device, fallback }) {
  status("ready", `Ready on ${device}`);
  $("status").title = fallback ?? "";
}

function choose(model) {
  useModel(model);
  const several = state.models.length > 1;
  $("model-name").textContent = several || !model ? "" : titleOf(model);
  $("model").selectedIndex = state.models.indexOf(model);
  const names = model?.classes ?? [];
  const list = new Intl.ListFormat("en-GB").format(names);
  const finds = names.length > 8 ? `${names.length} classes` : list;
  $("finds").textContent = model ? `${model.name} finds ${finds}.` : "No model is ready.";
  const metrics = model?.metrics;
  $("quality").textContent = metrics
    ? `AP50 ${metrics.ap50.toFixed(2)}, AP ${metrics.ap.toFixed(2)} on ${metrics.dataset} ${metrics.split}`
    : "";
  askAnew();
}

const titleOf = ({ name, version }) => `${name}, version ${version}`;
const isSame = (a) => (b) => a.name === b.name && a.version === b.version && a.sha256 === b.sha256;
const summaryOf = (found) =>
  JSON.stringify(found.map(({ name, version, state: is, sha256 }) => [name, version, is, sha256]));

/** Show the models; keep the chosen one while it is ready. */
function offer(found) {
  const options = found.map((model) => {
    const isReady = model.state === "ready";
    const option = new Option(isReady ? titleOf(model) : `${titleOf(model)}: ${model.state}`);
    option.disabled = !isReady;
    return option;
  });
  state.models = found;
  $("model").hidden = found.length < 2;
  $("model").replaceChildren(...options);
  const usable = found.filter((model) => model.state === "ready");
  const same = state.model && usable.find(isSame(state.model));
  if (same) {
    state.model = same;
    $("model").selectedIndex = found.indexOf(same);
    return;
  }
  const [other = null] = usable;
  if (state.model && other) toast(`The model has changed: this is ${titleOf(other)}.`);
  choose(other);
}

let refreshing = null;

/** Request the models; return whether that succeeded. */
function refreshBy(ask) {
  refreshing ??= ask()
    .then((found) => {
      // Replacing the options would close an open list.
      if (summaryOf(found) !== summaryOf(state.models)) offer(found);
      return true;
    })
    .catch((problem) => {
      if (!(problem instanceof Problem)) throw problem;
      if (problem.status === 401) status("locked", "An API key is needed");
      else if (!state.models.length) status("loading", problem.message);
      return false;
    })
    .finally(() => (refreshing = null));
  return refreshing;
}

const refresh = () => refreshBy(() => unlocked(models));

/** Refresh without opening the key dialog. */
const refreshQuietly = () => refreshBy(models);

async function modelGone() {
  const { model } = state;
  return (await refresh()) && state.model !== model;
}

/** Models may be loaded and unloaded while the page is open. */
function wireModels() {
  $("model").addEventListener("change", ({ target }) => choose(state.models[target.selectedIndex]));
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && state.models.length) refreshQuietly();
  });
  setInterval(() => {
    const isComing = ({ state: is }) => is === "waiting" || is === "loading";
    const mayChange = state.models.length > 0 && (!state.model || state.models.some(isComing));
    if (mayChange && !document.hidden && !state.offline) refreshQuietly();
  }, 3000);
}

/** Retry until the models are known or a key is missing. */
async function connect() {
  for (;;) {
    const ready = await untilReady();
    if (await refresh()) return sayReady(ready);
    if ($("status").dataset.state === "locked") return undefined;
    await pause(2);
  }
}

function unlock() {
  if ($("status").dataset.state !== "locked") return;
  status("loading", "Connecting…");
  connect();
}

const url = new URL("v1/detect", document.baseURI).href;
$("hello").textContent = `curl -F file=@cells.jpg ${url}`;
wireInput();
wireResult();
wireAsking();
wireModels();
connect();
