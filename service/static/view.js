// Everything that is on the page follows from the state; these functions put it there.

import { detectUrl, explain, isPassing } from "./api.js";
import { colourOf, drawBoxes, drawHistogram, fit, resize } from "./drawing.js";
import { all, isAbove, isShown, lowestScore, ownThresholds, shown, state } from "./state.js";

const $ = (id) => document.getElementById(id);

export function render() {
  const picture = state.current;
  if (!picture) return;
  document.body.dataset.state = picture.status;
  renderPicture(picture);
  renderMessage(picture);
  renderScore();
  renderResult();
}

export function renderResult() {
  const picture = state.current;
  renderBoxes(picture);
  renderCounts(picture);
  renderTexts(picture);
  renderStrip();
  drawHistogram($("histogram"), all(picture), isShown, lowestScore());
}

function renderPicture({ image, answer }) {
  const usable = image.complete && image.naturalWidth > 0;
  $("picture").hidden = $("boxes").hidden = !usable;
  $("frame").classList.toggle("blank", !usable);
  if (!usable) return;
  const natural = { width: image.naturalWidth, height: image.naturalHeight };
  const room = { width: $("frame").clientWidth, height: Math.max(280, innerHeight - (state.pictures.length > 1 ? 270 : 190)) };
  const [width, height] = fit(natural, room);
  const context = resize($("picture"), width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  $("boxes").dataset.ready = String(Boolean(answer));
}

export function renderBoxes(picture) {
  const { image } = picture;
  if (!image.naturalWidth) return;
  const width = Number.parseFloat($("picture").style.width);
  const context = resize($("boxes"), width, Number.parseFloat($("picture").style.height));
  const scale = width / (picture.answer?.image.width ?? image.naturalWidth);
  const unit = width < 480 ? 0.8 : 1;
  const options = { scale, unit, labels: $("labels").checked, active: state.active };
  drawBoxes(context, shown(picture), options);
}

function renderMessage({ status, problem, file, note, answer, seconds }) {
  const failed = status === "failed";
  $("message").hidden = !failed;
  if (failed) {
    const [heading, text, reason] = explain(problem, file);
    $("message").querySelector("h2").textContent = heading;
    $("message").querySelector("p").textContent = `${file.name}: ${text}`;
    $("message").querySelector(".reason").textContent = reason && `The service says: ${reason}.`;
    $("retry").hidden = !isPassing(problem);
  }
  $("busy").hidden = !["waiting", "sending"].includes(status);
  $("busy").querySelector("span").textContent = note ?? "";
  const timing = answer?.timing_ms;
  const parts = ["decode", "queue", "inference"].filter((name) => timing?.[name] !== undefined);
  $("timing").textContent = timing
    ? `${timing.total.toFixed(0)} ms in the service, ${(1000 * seconds).toFixed(0)} ms in all`
    : "";
  $("timing").title = parts.map((name) => `${name} ${timing[name].toFixed(1)} ms`).join(", ");
  renderReadout();
}

function renderReadout() {
  const { current, active } = state;
  const { image, file } = current;
  if (active) {
    const { x1, y1, x2, y2 } = active.box;
    const size = `${(x2 - x1).toFixed(0)} × ${(y2 - y1).toFixed(0)} px`;
    const place = `at ${x1.toFixed(0)}, ${y1.toFixed(0)}`;
    $("readout").textContent = `${active.label} ${active.score.toFixed(3)}, ${size} ${place}`;
  } else {
    const size = image.naturalWidth ? `, ${image.naturalWidth} × ${image.naturalHeight}` : "";
    $("readout").textContent = `${file.name}${size}`;
  }
}

export function renderScore() {
  const own = Object.values(ownThresholds());
  $("score").min = lowestScore();
  $("score").value = state.score ?? (own.length ? Math.min(...own) : 0.3);
  const isOneForAll = new Set(own).size <= 1;
  const score = state.score ?? (isOneForAll ? own[0] : null);
  $("score-value").value = score === null ? "per class" : (score ?? 0.3).toFixed(2);
  $("score").setAttribute("aria-valuetext", $("score-value").value);
  const each = Object.entries(ownThresholds()).map(([name, value]) => `${name} ${value}`);
  const model = isOneForAll ? "The model's own threshold" : `The model's own: ${each.join(", ")}`;
  $("score-note").textContent = state.score === null ? model : "Chosen here; nothing is sent again";
  $("reset").hidden = state.score === null;
}

function renderCounts(picture) {
  const names = state.model?.classes ?? [];
  const total = { here: 0, everywhere: 0 };
  const [wanted, several] = [names.length > 12 ? present() : names, state.pictures.length > 1];
  if ($("classes").dataset.names !== wanted.join("\n")) buildClasses(wanted);
  const texts = wanted.map((name) => {
    const count = all(picture).filter((d) => isAbove(d) && d.label === name).length;
    const sum = state.pictures.flatMap(all).filter((d) => isAbove(d) && d.label === name).length;
    const row = $("classes").querySelector(`[data-class="${CSS.escape(name)}"]`);
    row.querySelector("input").checked = !state.hidden.has(name);
    row.querySelector(".count").textContent = picture.answer ? count : "";
    row.querySelector(".sum").textContent = several ? `of ${sum}` : "";
    if (!state.hidden.has(name)) {
      total.here += count;
      total.everywhere += sum;
    }
    return state.hidden.has(name) ? "" : `${count} ${name}`;
  });
  const everywhere = several ? ` of ${total.everywhere} in ${state.pictures.length} pictures` : "";
  $("total").textContent = picture.answer ? `${total.here}${everywhere || " shown"}` : "";
  if (picture.answer) announce(texts.filter(Boolean).join(", ") || "nothing shown");
}

/** Classes that some answer has, for models that know many. */
function present() {
  const found = new Set(state.pictures.flatMap(all).map((detection) => detection.label));
  return state.model.classes.filter((name) => found.has(name));
}

function buildClasses(names) {
  $("classes").dataset.names = names.join("\n");
  $("classes").replaceChildren(
    ...names.map((name) => {
      const row = document.createElement("li");
      row.dataset.class = name;
      row.innerHTML =
        '<label><input type="checkbox"><i></i><span class="name"></span></label>' +
        '<span class="count"></span><span class="sum"></span>';
      row.style.setProperty("--colour", colourOf(state.model.classes.indexOf(name)));
      row.querySelector(".name").textContent = name;
      return row;
    }),
  );
}

let announcing = 0;

/** Once the slider rests: a screen reader would stumble over every step. */
function announce(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("summary").textContent = text), 400);
}

/** The answer as the service would give it at what is chosen now. */
export function chosenAnswer(picture) {
  return { ...picture.answer, detections: shown(picture) };
}

function chosenUrl() {
  const { models: several, model, score, hidden } = state;
  const classes = hidden.size ? model.classes.filter((name) => !hidden.has(name)) : null;
  return detectUrl({ model: several.length > 1 ? model : null, threshold: score, classes });
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function renderTexts(picture) {
  const done = picture.status === "done";
  for (const id of ["save-picture", "save-json"]) $(id).disabled = !done;
  $("answer").hidden = !done;
  if (!done) return;
  $("curl-line").textContent = `curl --data-binary ${quote("@" + picture.file.name)} ${quote(chosenUrl())}`;
  $("json-text").textContent = JSON.stringify(chosenAnswer(picture), null, 2);
  $("list").querySelector("tbody").replaceChildren(...shown(picture).map(tableRow));
}

function tableRow(detection) {
  const row = document.createElement("tr");
  const { x1, y1, x2, y2 } = detection.box;
  const numbers = [x1, y1, x2, y2].map((value) => value.toFixed(1));
  for (const text of [detection.label, detection.score.toFixed(3), ...numbers]) {
    row.insertCell().textContent = text;
  }
  row.tabIndex = 0;
  for (const event of ["focus", "pointerenter"]) row.addEventListener(event, () => point(detection));
  for (const event of ["blur", "pointerleave"]) row.addEventListener(event, () => point(null));
  return row;
}

export function point(detection) {
  if (detection === state.active || !state.current) return;
  state.active = detection;
  renderBoxes(state.current);
  renderReadout();
}

export function renderStrip() {
  const { pictures, current } = state;
  $("strip").hidden = pictures.length < 2;
  const items = pictures.map((picture, index) => {
    const item = $("strip").children[index] ?? document.createElement("li");
    item.innerHTML ||= '<button type="button"><img alt="" decoding="async"><b></b></button>';
    const button = item.firstElementChild;
    button.dataset.status = picture.status;
    button.ariaCurrent = String(picture === current);
    button.ariaLabel = `${picture.file.name}, picture ${index + 1} of ${pictures.length}`;
    const thumbnail = button.firstElementChild;
    if (thumbnail.src !== picture.url) thumbnail.src = picture.url;
    thumbnail.hidden = picture.status === "failed" && !picture.image.naturalWidth;
    const marks = { done: picture.answer ? shown(picture).length : "", failed: "!" };
    button.lastElementChild.textContent = marks[picture.status] ?? "…";
    return item;
  });
  $("strip").replaceChildren(...items);
}
