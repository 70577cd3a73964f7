// Calls to the service, and what to tell a person when one fails. Every URL is relative to the
// page, so that the service may live below any path.

export class Problem extends Error {
  /** status is 0 where there was no answer at all; retryAfter is in seconds or null. */
  constructor(status, title, detail = "", retryAfter = null) {
    super(detail || title);
    Object.assign(this, { status, title, detail, retryAfter });
  }
}

async function call(url, options) {
  let response;
  try {
    response = await fetch(url, { cache: "no-store", ...options });
  } catch (error) {
    throw new Problem(0, "No answer", String(error));
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  const detail = body.detail ?? body.reason ?? "";
  const title = body.title ?? response.statusText;
  throw new Problem(response.status, title, detail, Number.isFinite(seconds) ? seconds : null);
}

export const readiness = () => call("readyz");

/** [{name, version, ...facts}], one entry for each version that is ready, the default first. */
export async function models() {
  const { models: found } = await call("v1/models");
  const versions = found.flatMap(({ name, default: isDefault, serving, versions: all }) =>
    all.map((each) => ({ ...each, name, first: isDefault && each.version === serving })),
  );
  return versions
    .filter((each) => each.state === "ready")
    .sort((a, b) => Number(b.first) - Number(a.first));
}

export function detectUrl({ model, threshold, classes }) {
  const url = new URL("v1/detect", document.baseURI);
  if (threshold !== null) url.searchParams.set("score_threshold", threshold);
  if (classes) url.searchParams.set("classes", classes.join(","));
  if (model) {
    url.searchParams.set("model", model.name);
    url.searchParams.set("version", model.version);
  }
  return url.href.replaceAll("%2C", ",");
}

/** The picture is sent as it is. Its declared type is not: the service judges by content. */
export async function detect(file, query) {
  const options = {
    method: "POST",
    body: file,
    headers: { Accept: "application/json", "Content-Type": "application/octet-stream" },
  };
  try {
    return await call(detectUrl(query), options);
  } catch (problem) {
    if (problem.status === 0) throw await whyNoAnswer(file);
    throw problem;
  }
}

/** A browser tells nothing of a connection that broke; the file and the server's health do. */
async function whyNoAnswer(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return new Problem(-1, "File cannot be read");
  }
  const alive = await fetch("healthz", { cache: "no-store" }).then((r) => r.ok, () => false);
  // A server that refuses a body unread closes the connection, often before its answer is read.
  return alive ? new Problem(413, "Too large") : new Problem(0, "No answer");
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

const MESSAGES = {
  [-1]: () => ["The browser cannot read this file", "It was moved or changed, or it is a folder."],
  0: () => ["The service does not answer", "Is it still running, and is the network there?"],
  400: (file) => [
    "This picture is damaged",
    file.size === 0 ? "The file is empty." : "It looks cut off or broken; a fresh copy may work.",
  ],
  401: () => ["This service wants an API key", "Ask whoever runs it, and use the API with the key."],
  404: () => ["This model is gone", "Reload the page to see the models that are there now."],
  408: () => ["The upload was too slow", "The service gave up waiting; try again on a better line."],
  413: (file) => ["This picture is too large", `The file has ${megabytes(file.size)}.`],
  415: (file) => [
    "This is not a picture the service can read",
    /\.hei[cf]$/i.test(file.name)
      ? "Phones save HEIC unless told otherwise; send it as JPEG, PNG or WebP."
      : "It takes JPEG, PNG and WebP, and looks at the content rather than the name.",
  ],
  422: () => ["The service refused a setting", ""],
  429: () => ["Too many requests", "The limit for now is used up."],
  503: () => ["The service is busy", "It is loading, stopping or has too much to do."],
  504: () => ["The service was too slow", "The picture was accepted, but its time ran out."],
};

/** [heading, text, the service's own reason] in plain words. */
export function explain(problem, file) {
  const other = () => [`The service failed (${problem.status})`, problem.title];
  const [heading, text] = (MESSAGES[problem.status] ?? other)(file);
  return [heading, text, problem.status > 0 ? problem.detail : ""];
}

/** Whether the same request may well succeed later without anything being changed. */
export const isPassing = (problem) => [0, 408, 429, 503, 504].includes(problem.status);
