// Downloads: the detections chosen on the page, in the formats of the service and its command line.

import { shown, state } from "./state.js";

const COLUMNS = ["file", "label", "class_id", "score", "x1", "y1", "x2", "y2"];

/** The response of the service at the chosen thresholds. */
export const chosenAnswer = (image) => ({ ...image.answer, detections: shown(image) });

/** One image as POST /v1/detect responds, several as POST /v1/detect/batch does. */
export function toJson(images) {
  if (images.length === 1) return JSON.stringify(chosenAnswer(images[0]), null, 2);
  const results = images.flatMap((image, index) => {
    const which = { index, id: image.name };
    if (image.status === "failed") {
      const { status, title, detail } = image.problem;
      return [{ ...which, status, error: { status, title, detail } }];
    }
    if (image.status !== "done") return [];
    const answer = chosenAnswer(image);
    return [{ ...which, status: 200, image: answer.image, detections: answer.detections }];
  });
  const { name, version } = state.model;
  return JSON.stringify({ results, model: { name, version } }, null, 2);
}

/** The columns of `retinaserve detect --output csv`, behind the mark by which Excel knows UTF-8. */
export function toCsv(images) {
  const rows = images.flatMap((image) =>
    shown(image).map(({ label, class_id: index, score, box }) => [
      image.name, label, index, score, box.x1, box.y1, box.x2, box.y2,
    ]),
  );
  return `\ufeff${[COLUMNS, ...rows].map((row) => `${row.map(field).join(",")}\n`).join("")}`;
}

function field(value) {
  // A quote in front of what a spreadsheet would compute, as in service/filenames.py.
  const text = /^[=+\-@\t\r\n']/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  // The browser has the blob once the click is handled; some take a moment longer.
  setTimeout(() => URL.revokeObjectURL(link.href), 2000);
}

export const stem = ({ name }) => name.split("/").at(-1).replace(/\.[^.]+$/, "");
