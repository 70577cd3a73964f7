// What the browser itself makes of a picture. One is decoded at a time, the one on show first, and
// few are kept large: a folder of photographs would fill the memory.

import { state } from "./state.js";

const LARGE_ONES = 6;
const broken = { failure: "this browser cannot paint in the background" };

const jobs = new Map();
const kept = []; // pictures that have a preview, the latest last
let worker = null;
let works = true;
let last = 0;

function start() {
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }) => {
    jobs.get(data.id)(data.result);
    jobs.delete(data.id);
  });
  worker.addEventListener("error", () => {
    works = false;
    for (const resolve of jobs.values()) resolve(broken);
    jobs.clear();
  });
}

function run(job) {
  if (!worker) start();
  if (!works) return broken;
  return new Promise((resolve) => {
    last += 1;
    jobs.set(last, resolve);
    worker.postMessage({ id: last, ...job });
  });
}

let looking = false;

/** Decode whatever the page can show now; `changed` is called with each picture that came. */
export async function lookAtAll(changed) {
  if (looking) return;
  looking = true;
  for (let picture; (picture = nextToLookAt()); ) {
    const large = picture === state.current;
    const seen = await run({ kind: "look", file: picture.file, large });
    if (!state.pictures.includes(picture)) {
      seen.thumbnail?.close();
      seen.preview?.close();
      continue;
    }
    keep(picture, seen);
    changed(picture);
  }
  looking = false;
}

function nextToLookAt() {
  const { current, pictures } = state;
  if (current && !current.preview && !current.undrawable) return current;
  return pictures.find((picture) => !picture.thumbnail && !picture.undrawable);
}

function keep(picture, { size, thumbnail, preview, failure }) {
  picture.undrawable = Boolean(failure);
  if (failure) return;
  picture.size = size;
  picture.thumbnail ??= painted(thumbnail);
  thumbnail.close();
  if (!preview) return;
  picture.preview = preview;
  kept.push(picture);
  if (kept.length > LARGE_ONES) {
    forget(kept.find((each) => each !== state.current));
  }
}

function painted(bitmap) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas;
}

/** Free what a picture holds besides its file. */
export function forget(picture) {
  picture.preview?.close();
  picture.preview = null;
  const index = kept.indexOf(picture);
  if (index >= 0) kept.splice(index, 1);
}

/** The picture in its full size with boxes, as a PNG blob; null where this browser cannot. */
export async function annotatedBlob({ file }, detections, options) {
  const { blob } = await run({ kind: "annotate", file, detections, options });
  return blob ?? null;
}
