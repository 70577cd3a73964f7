// The request queue: few images at a time, paused while the service refuses.

import {
  CANCELLED, CUT_OFF, NO_ANSWER, Problem, detect, explain, isPassing,
} from "./api.js";
import { unlocked } from "./key.js";
import { isUnfinished, lowestScore, state } from "./state.js";

const AT_ONCE = 2; // one uploads while the other is looked at; more would only crowd others out
const PATIENCE = 60; // seconds of being refused before a person is asked whether to go on
const CUT_OFF_TRIES = 3; // a service that is too busy may cut an upload off just as well

/** What the queue needs of the page: set by `wireQueue`. */
const page = { changed: () => {}, news: () => {}, lost: () => {}, modelGone: async () => false };

export const wireQueue = (hooks) => Object.assign(page, hooks);

let asked = 0;

export function askForAll() {
  while (asked < AT_ONCE && nextToAsk()) {
    asked += 1;
    ask(nextToAsk()).finally(() => {
      asked -= 1;
      askForAll();
    });
  }
}

function nextToAsk() {
  const { current, hold, model, offline, images } = state;
  if (!model || hold || offline) return null;
  const waits = ({ status }) => status === "waiting";
  return current && waits(current) ? current : images.find(waits);
}

function change(image, values) {
  Object.assign(image, values);
  page.changed(image);
}

async function ask(image) {
  const controller = new AbortController();
  const { signal } = controller;
  const query = { model: state.model, tile: state.tile, threshold: lowestScore() };
  const started = performance.now();
  change(image, { status: "sending", problem: null, controller });
  try {
    const answer = await unlocked(() => detect(image.file, query, signal));
    if (signal.aborted) return;
    const seconds = (performance.now() - started) / 1000;
    change(image, { status: "done", answer, seconds, refusedSince: null, cutOff: 0 });
  } catch (problem) {
    // The caller that cancelled it has set the state of the image.
    if (signal.aborted) return;
    if (!(problem instanceof Problem)) throw problem;
    await refused(image, problem, signal);
  }
}

async function refused(image, problem, signal) {
  image.refusedSince ??= performance.now();
  image.cutOff = (image.cutOff ?? 0) + Number(problem.status === CUT_OFF);
  const isPatient = performance.now() - image.refusedSince < 1000 * PATIENCE;
  if (problem.retryAfter !== null && isPatient) return hold(image, problem, problem.retryAfter);
  if (image.cutOff && image.cutOff < CUT_OFF_TRIES) return hold(image, problem, 1);
  if (problem.status === 404 && (await page.modelGone())) return;
  if (signal.aborted) return;
  if (problem.status === NO_ANSWER) {
    state.offline = true;
    page.lost();
  }
  Object.assign(image, { refusedSince: null, cutOff: 0 });
  change(image, { status: "failed", problem });
}

/** Pause until the Retry-After of the service. */
function hold(image, problem, seconds) {
  const until = performance.now() + 1000 * Math.max(1, seconds);
  const isNew = state.hold === null;
  if (isNew || until > state.hold.until) state.hold = { problem, until };
  change(image, { status: "waiting" });
  if (isNew) {
    page.news(holdText());
    setTimeout(tick, 250);
  }
}

function tick() {
  if (!state.hold) return;
  if (performance.now() >= state.hold.until) return goOn();
  page.changed(null);
  setTimeout(tick, 250);
}

/** End the pause. */
export function goOn() {
  state.hold = null;
  page.changed(null);
  askForAll();
}

export function holdText() {
  const { problem, until } = state.hold;
  const [heading] = explain(problem, { size: 0, name: "" });
  const left = Math.max(1, Math.ceil((until - performance.now()) / 1000));
  return `${heading}. Trying again in ${left} s.`;
}

/** Cancel all requests and repeat them, after a change of model or tiles. */
export function askAnew() {
  for (const image of state.images) {
    image.controller?.abort();
    change(image, { status: "waiting", answer: null, problem: null, refusedSince: null });
  }
  askForAll();
}

export function cancelAll() {
  state.hold = null;
  for (const image of state.images.filter(isUnfinished)) {
    image.controller?.abort();
    change(image, { status: "failed", problem: new Problem(CANCELLED, "Cancelled") });
  }
}

export const passing = () =>
  state.images.filter(({ status, problem }) => status === "failed" && isPassing(problem));

/** Retry every image whose failure may have been temporary. */
export function retryAll() {
  state.offline = false;
  for (const image of passing()) change(image, { status: "waiting", problem: null });
  askForAll();
}
