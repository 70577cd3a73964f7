// Images decoded by the browser. One is decoded at a time, the one on show first, and
// few are kept large: a folder of photographs would fill the memory.

import { state } from "./state.js";

const LARGE_ONES = 6;
const broken = { failure: "this browser cannot paint in the background" };

const jobs = new Map();
const kept = []; // images that have a preview, the latest last
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

/** Decode the images that the page shows; `changed` is called with each decoded image. */
export async function lookAtAll(changed) {
  if (looking) return;
  looking = true;
  for (let image; (image = nextToLookAt()); ) {
    const large = image === state.current;
    const seen = await run({ kind: "look", file: image.file, large });
    if (!state.images.includes(image)) {
      seen.thumbnail?.close();
      seen.preview?.close();
      continue;
    }
    keep(image, seen);
    changed(image);
  }
  looking = false;
}

function nextToLookAt() {
  const { current, images } = state;
  if (current && !current.preview && !current.undrawable) return current;
  return images.find((image) => !image.thumbnail && !image.undrawable);
}

function keep(image, { size, thumbnail, preview, failure }) {
  image.undrawable = Boolean(failure);
  if (failure) return;
  image.size = size;
  image.thumbnail ??= painted(thumbnail);
  thumbnail.close();
  if (!preview) return;
  image.preview = preview;
  kept.push(image);
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

/** Free what an image holds besides its file. */
export function forget(image) {
  image.preview?.close();
  image.preview = null;
  const index = kept.indexOf(image);
  if (index >= 0) kept.splice(index, 1);
}

/** The image in its full size with boxes, as a PNG blob; null where this browser cannot. */
export async function annotatedBlob({ file }, detections, options) {
  const { blob } = await run({ kind: "annotate", file, detections, options });
  return blob ?? null;
}
