// Decodes and paints images beside the page: fifty million pixels would hold it up for seconds.

import { annotated } from "./drawing.js";

const PREVIEW = 2400; // longer side in pixels: more than the page shows on any screen
const THUMBNAIL = 140;

// The service turns images as their EXIF data says; so must every browser.
const decode = (file) => createImageBitmap(file, { imageOrientation: "from-image" });

function shrunk(bitmap, longest) {
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const side = (length) => Math.max(1, Math.round(length * scale));
  const canvas = new OffscreenCanvas(side(bitmap.width), side(bitmap.height));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.transferToImageBitmap();
}

const JOBS = {
  /** An image's size, its thumbnail and, if asked for, a preview. */
  async look({ file, large }) {
    const bitmap = await decode(file);
    const { width, height } = bitmap;
    const thumbnail = shrunk(bitmap, THUMBNAIL);
    const preview = large ? shrunk(bitmap, PREVIEW) : null;
    bitmap.close();
    return { size: { width, height }, thumbnail, preview };
  },

  /** An image in its full size with its boxes, as a PNG blob. */
  async annotate({ file, detections, options }) {
    const bitmap = await decode(file);
    try {
      return { blob: await annotated(bitmap, detections, options) };
    } finally {
      bitmap.close();
    }
  },
};

addEventListener("message", async ({ data: { id, kind, ...job } }) => {
  try {
    const result = await JOBS[kind](job);
    postMessage({ id, result }, [result.thumbnail, result.preview].filter(Boolean));
  } catch (error) {
    postMessage({ id, result: { failure: String(error) } });
  }
});
