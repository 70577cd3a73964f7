// These functions render the state.

import { detectUrl, explain, isPassing } from "./api.js";
import { chosenAnswer } from "./downloads.js";
import { colourOf, drawBoxes, drawHistogram, fit, resize } from "./drawing.js";
import { currentKey } from "./key.js";
import { holdText, passing } from "./queue.js";
import { all, isAbove, isShown, isUnfinished, lowestScore, shown, state } from "./state.js";

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function render() {
  const image = state.current;
  if (!image) return;
  document.body.dataset.state = image.status;
  renderImage(image);
  renderMessage(image);
  renderTiming(image);
  renderReadout();
  renderScore();
  renderResult();
  renderQueue();
}

export function renderResult() {
  const image = state.current;
  renderBoxes();
  renderCounts();
  renderTexts(image);
  renderTable(image);
  state.images.forEach(renderThumbnail);
  drawHistogram($("histogram"), all(image), isShown, lowestScore());
}

/** After a change of one image, or of the queue alone. */
export function renderChange(image) {
  if (image && image === state.current) return render();
  if (image && state.images.includes(image)) {
    renderThumbnail(image, state.images.indexOf(image));
    if (image.answer) renderCounts();
  }
  renderQueue();
}

// ---- the image

function renderImage({ preview, thumbnail, size, answer }) {
  const source = preview ?? thumbnail;
  $("image").hidden = $("boxes").hidden = !source;
  $("frame").classList.toggle("blank", !source);
  if (!source) return;
  const below = state.images.length > 1 ? 280 : 200;
  const room = { width: $("frame").clientWidth, height: Math.max(280, innerHeight - below) };
  const [width, height] = fit(size, room);
  const context = resize($("image"), width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  $("boxes").dataset.ready = String(Boolean(answer));
}

export function renderBoxes() {
  const image = state.current;
  if (!image?.size) return;
  const width = Number.parseFloat($("image").style.width);
  const context = resize($("boxes"), width, Number.parseFloat($("image").style.height));
  const scale = width / (image.answer?.image.width ?? image.size.width);
  const unit = width < 480 ? 0.8 : 1;
  const options = { scale, unit, labels: $("labels").checked, active: state.active };
  drawBoxes(context, shown(image), options);
}

function renderMessage({ status, problem, file, name }) {
  const failed = status === "failed";
  $("message").hidden = !failed;
  if (!failed) return;
  const [heading, text, reason] = explain(problem, file);
  $("retry").hidden = !isPassing(problem);
  const texts = [heading, `${name}: ${text}`, reason && `The service says: ${reason}.`];
  texts.forEach((wanted, index) => {
    // Written only when it is another: each writing is read aloud.
    const line = $("message").children[index];
    if (line.textContent !== wanted) line.textContent = wanted;
  });
}

function renderTiming({ answer, seconds }) {
  const timing = answer?.timing_ms;
  if (!timing) return $("timing").replaceChildren();
  const stages = ["decode", "queue", "inference"].filter((name) => timing[name] !== undefined);
  const parts = stages.map((name) => `${name} ${timing[name].toFixed(1)}`).join(" · ");
  const whole = `${timing.total.toFixed(0)} ms in the service, ${(1000 * seconds).toFixed(0)} ms in all`;
  $("timing").replaceChildren(whole, element("span", { className: "parts", textContent: parts }));
}

function renderReadout() {
  const { current, active } = state;
  if (active) {
    const { x1, y1, x2, y2 } = active.box;
    const size = `${(x2 - x1).toFixed(0)} × ${(y2 - y1).toFixed(0)} px`;
    const place = `at ${x1.toFixed(0)}, ${y1.toFixed(0)}`;
    $("readout").textContent = `${active.label} ${active.score.toFixed(3)}, ${size} ${place}`;
  } else {
    const { name, size, answer } = current;
    const { width, height } = size ?? answer?.image ?? {};
    const tiles = answer?.image.tiles ?? 1;
    const parts = [name, width && `${width} × ${height}`, tiles > 1 && `looked at in ${tiles} pieces`];
    $("readout").textContent = parts.filter(Boolean).join(", ");
  }
}

// ---- the queue and the row of images

export function renderQueue() {
  const { images, current, hold } = state;
  const left = images.filter(isUnfinished).length;
  const failed = passing().length;
  $("queue").hidden = left === 0;
  $("progress").max = images.length;
  $("progress").value = images.length - left;
  $("progress").hidden = $("progress-text").hidden = images.length < 2;
  $("progress-text").textContent = `${images.length - left} of ${images.length}`;
  $("now").hidden = hold === null;
  $("retry").textContent = failed > 1 ? `Try all ${failed} again` : "Try again";
  $("busy").hidden = !current || !isUnfinished(current);
  const resting = state.offline ? "Waiting for the service…" : "Waiting…";
  const note = current?.status === "sending" ? "Looking…" : resting;
  $("busy").lastElementChild.textContent = hold ? holdText() : note;
  renderSaves();
}

const MARKS = { failed: "!", waiting: "…", sending: "…" };

export function renderStrip() {
  const several = state.images.length > 1;
  $("strip").hidden = $("strip-hint").hidden = !several;
  while ($("strip").children.length > state.images.length) $("strip").lastElementChild.remove();
  while ($("strip").children.length < state.images.length) {
    const button = element("button", { type: "button" }, element("b"));
    $("strip").append(element("li", {}, button));
  }
  state.images.forEach(renderThumbnail);
}

function renderThumbnail(image, index) {
  const button = $("strip").children[index]?.firstElementChild;
  if (!button) return;
  const isCurrent = image === state.current;
  const mark = button.lastElementChild;
  mark.textContent = MARKS[image.status] ?? shown(image).length;
  const outcome = { done: `${mark.textContent} detections`, failed: "failed" };
  button.dataset.status = image.status;
  button.ariaCurrent = String(isCurrent);
  button.tabIndex = isCurrent ? 0 : -1;
  const place = `image ${index + 1} of ${state.images.length}`;
  button.ariaLabel = `${image.name}, ${place}, ${outcome[image.status] ?? "waiting"}`;
  const { thumbnail } = image;
  const old = button.querySelector("canvas");
  if (old !== (thumbnail ?? null)) {
    old?.remove();
    if (thumbnail) button.prepend(thumbnail);
  }
}

// ---- the panel

export function renderScore() {
  const own = Object.values(state.own);
  $("score").min = lowestScore();
  $("score").value = state.score ?? (own.length ? Math.min(...own) : 0.3);
  const isOneForAll = new Set(own).size <= 1;
  // The model's own in full: a rounded threshold may keep other detections.
  const modelScore = isOneForAll ? String(own[0] ?? 0.3) : "per class";
  $("score-value").value = state.score?.toFixed(2) ?? modelScore;
  $("score").setAttribute("aria-valuetext", $("score-value").value);
  const each = Object.entries(state.own).map(([name, value]) => `${name} ${value}`);
  const model = isOneForAll ? "The model's own threshold" : `The model's own: ${each.join(", ")}`;
  $("score-note").textContent = state.score === null ? model : "Chosen here; nothing is sent again";
  $("reset").hidden = state.score === null;
}

/** Class -> detections above the score, those of classes that are switched off too. */
function tally(images) {
  const counts = new Map();
  for (const detection of images.flatMap(all).filter(isAbove)) {
    counts.set(detection.label, (counts.get(detection.label) ?? 0) + 1);
  }
  return counts;
}

function renderCounts() {
  const { current, hidden, model, images } = state;
  const names = model?.classes ?? [];
  const several = images.length > 1;
  const [here, everywhere] = [tally([current]), several ? tally(images) : new Map()];
  const isKnown = several && images.some(({ answer }) => answer);
  const wanted = names.length > 12 ? names.filter((name) => isPresent(name)) : names;
  if ($("classes").dataset.names !== wanted.join("\n")) buildClasses(wanted);
  wanted.forEach((name, index) => {
    const row = $("classes").children[index];
    row.querySelector("input").checked = !hidden.has(name);
    row.querySelector(".count").textContent = current.answer ? (here.get(name) ?? 0) : "";
    row.querySelector(".sum").textContent = isKnown ? `of ${everywhere.get(name) ?? 0}` : "";
  });
  const visible = wanted.filter((name) => !hidden.has(name));
  const sum = (counts) => visible.reduce((total, name) => total + (counts.get(name) ?? 0), 0);
  const rest = several ? ` of ${sum(everywhere)} in ${images.length} images` : " shown";
  $("total").textContent = current.answer ? `${sum(here)}${rest}` : "";
  $("no-classes").hidden = wanted.length > 0 || !current.answer;
  $("every").hidden = wanted.length < 3;
  $("every").textContent = visible.length ? "Hide all" : "Show all";
  if (!current.answer) return;
  const texts = visible.map((name) => `${here.get(name) ?? 0} ${name}`);
  announce(`${current.name}: ${texts.join(", ") || "nothing shown"}`);
}

const isPresent = (name) =>
  state.images.some((image) => all(image).some(({ label }) => label === name));

function buildClasses(names) {
  $("classes").dataset.names = names.join("\n");
  const rows = names.map((name) => {
    const box = element("input", { type: "checkbox" });
    const title = element("span", { className: "name", textContent: name });
    const row = element("li", {}, element("label", {}, box, element("i"), title));
    row.append(element("span", { className: "count" }), element("span", { className: "sum" }));
    row.dataset.class = name;
    row.style.setProperty("--colour", colourOf(state.model.classes.indexOf(name)));
    return row;
  });
  $("classes").replaceChildren(...rows);
}

let announcing = 0;

/** Announce a value once the slider rests, not at every step. */
function announce(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("summary").textContent = text), 400);
}

function chosenUrl() {
  const { models, model, score, hidden, tile } = state;
  const classes = hidden.size ? model.classes.filter((name) => !hidden.has(name)) : null;
  return detectUrl({ model: models.length > 1 ? model : null, threshold: score, classes, tile });
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function renderSaves() {
  const { images, current } = state;
  const done = images.filter(({ status }) => status === "done").length;
  const through = images.filter((each) => !isUnfinished(each)).length;
  $("save-image").disabled = current?.status !== "done" || current.undrawable === true;
  $("save-json").disabled = $("save-csv").disabled = done === 0;
  const which = through < images.length ? `the ${through} images so far` : "all images";
  $("save-note").hidden = images.length < 2;
  $("save-note").textContent = `JSON and CSV hold ${which}.`;
}

function renderTexts(image) {
  const done = image.status === "done";
  $("answer").hidden = !done;
  if (!done) return;
  // Never the key itself: the line is copied and shared.
  const key = currentKey() === null ? "" : ' -H "X-API-Key: $KEY"';
  const file = quote("@" + image.file.name);
  $("curl-line").textContent = `curl${key} --data-binary ${file} ${quote(chosenUrl())}`;
  $("json-text").textContent = JSON.stringify(chosenAnswer(image), null, 2);
}

function renderTable(image) {
  const rows = shown(image).map(tableRow);
  if (rows.length) rows[0].tabIndex = 0;
  $("list").querySelector("tbody").replaceChildren(...rows);
  $("list-hint").hidden = rows.length === 0;
  $("nothing").hidden = rows.length > 0;
}

function tableRow(detection) {
  const row = element("tr", { tabIndex: -1 });
  const { x1, y1, x2, y2 } = detection.box;
  const numbers = [x1, y1, x2, y2].map((value) => value.toFixed(1));
  for (const text of [detection.label, detection.score.toFixed(3), ...numbers]) {
    row.insertCell().textContent = text;
  }
  for (const event of ["focus", "pointerenter"]) row.addEventListener(event, () => point(detection));
  for (const event of ["blur", "pointerleave"]) row.addEventListener(event, () => point(null));
  return row;
}

export function point(detection) {
  if (detection === state.active || !state.current) return;
  state.active = detection;
  renderBoxes();
  renderReadout();
}

// ---- notices

let toasting = 0;

export function toast(text) {
  $("toast").textContent = text;
  clearTimeout(toasting);
  toasting = setTimeout(() => ($("toast").textContent = ""), 5000);
}

/** Announce a change to screen readers. */
export const news = (text) => ($("news").textContent = text);
