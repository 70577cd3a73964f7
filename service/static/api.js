// Requests to the service, and the texts for those that fail. Every URL is relative to the page,
// so that the service works below any path.

import { keyHeaders } from "./key.js";

/** The status of a problem without a response. */
export const NO_ANSWER = 0;
export const UNREADABLE = -1;
export const CUT_OFF = -2;
export const CANCELLED = -3;

export class Problem extends Error {
  /** status is that of HTTP or one of the above; retryAfter is in seconds or null. */
  constructor(status, title, detail = "", retryAfter = null) {
    super(detail || title);
    Object.assign(this, { status, title, detail, retryAfter });
  }
}

async function call(url, options) {
  let response;
  try {
    const headers = { ...keyHeaders(), ...options?.headers };
    response = await fetch(url, { cache: "no-store", ...options, headers });
  } catch (error) {
    throw new Problem(NO_ANSWER, "No answer", String(error));
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  const detail = body.detail ?? body.reason ?? "";
  const title = body.title ?? response.statusText;
  throw new Problem(response.status, title, detail, Number.isFinite(seconds) ? seconds : null);
}

export const readiness = () => call("readyz");

/** [{name, version, state, ...facts}], one entry for each version, the one that answers first. */
export async function models() {
  const { models: found } = await call("v1/models");
  const versions = found.flatMap(({ name, default: isDefault, serving, versions: every }) =>
    every.map((each) => ({ ...each, name, first: isDefault && each.version === serving })),
  );
  return versions.sort((a, b) => Number(b.first) - Number(a.first));
}

export function detectUrl({ model, threshold, classes, tile }) {
  const url = new URL("v1/detect", document.baseURI);
  if (threshold !== null) url.searchParams.set("score_threshold", threshold);
  if (classes) url.searchParams.set("classes", classes.join(","));
  if (tile) url.searchParams.set("tile", "auto");
  if (model) {
    url.searchParams.set("model", model.name);
    url.searchParams.set("version", model.version);
  }
  return url.href.replaceAll("%2C", ",");
}

/** The image is sent as it is. Its declared type is not: the service judges by content. */
export async function detect(file, query, signal) {
  const options = {
    method: "POST",
    body: file,
    headers: { Accept: "application/json", "Content-Type": "application/octet-stream" },
    signal,
  };
  try {
    return await call(detectUrl(query), options);
  } catch (problem) {
    if (problem.status === NO_ANSWER && !signal.aborted) throw await whyNoAnswer(file);
    throw problem;
  }
}

/** Browsers do not say why a connection broke; the file and the service's health tell. */
async function whyNoAnswer(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return new Problem(UNREADABLE, "File cannot be read");
  }
  const alive = await fetch("healthz", { cache: "no-store" }).then((r) => r.ok, () => false);
  // A service that refuses a body unread closes the connection, often before its response is read.
  return alive ? new Problem(CUT_OFF, "Connection closed") : new Problem(NO_ANSWER, "No answer");
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

const MESSAGES = {
  [CANCELLED]: () => ["Cancelled", "This image was not looked at."],
  [CUT_OFF]: (file) => [
    "The service took only a part of this image",
    `The file has ${megabytes(file.size)} and is probably too large. If others pass, try again.`,
  ],
  [UNREADABLE]: () => ["The browser cannot read this file", "It was moved, changed or deleted."],
  [NO_ANSWER]: () => ["The service does not answer", "Is it still running, and the network there?"],
  400: (file) => [
    "This image is damaged",
    file.size === 0 ? "The file is empty." : "It looks cut off or broken; a fresh copy may work.",
  ],
  401: () => ["The service wants an API key", "The operator of the service can give you one."],
  404: () => ["This model is gone", "Choose another one above."],
  408: () => ["The upload was too slow", "The service gave up waiting; try again on a better line."],
  413: (file) => ["This image is too large", `The file has ${megabytes(file.size)}.`],
  415: (file) => [
    "This is not an image the service can read",
    /\.hei[cf]$/i.test(file.name)
      ? "Phones save HEIC unless told otherwise; send it as JPEG, PNG or WebP."
      : "It takes JPEG, PNG and WebP, and looks at the content rather than the name.",
  ],
  422: () => ["The service refused a setting", "The image itself may be fine."],
  429: () => ["Too many requests", "The limit for now is used up."],
  500: () => ["The service failed", "The reason is in its log."],
  503: () => ["The service is busy", "It is loading, stopping or has too much to do."],
  504: () => ["The service was too slow", "The image was accepted, but its time ran out."],
};

/** [heading, text, the service's own reason] in plain words. */
export function explain(problem, file) {
  const other = () => [`The service answered ${problem.status}`, problem.title];
  const [heading, text] = (MESSAGES[problem.status] ?? other)(file);
  return [heading, text, problem.status > 0 ? problem.detail : ""];
}

const PASSING = [CANCELLED, CUT_OFF, NO_ANSWER, 401, 408, 429, 500, 503, 504];

/** Return whether the same request may succeed later. */
export const isPassing = (problem) => PASSING.includes(problem.status);
