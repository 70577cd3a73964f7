// What the page knows, and what of an answer is shown at the thresholds chosen.

const LOWEST_SCORE = 0.05;

export const state = {
  models: [],
  model: null,
  pictures: [], // {file, url, image, status: waiting | sending | done | failed, answer, problem}
  current: null,
  score: null, // null: the model's own thresholds
  hidden: new Set(), // classes that are switched off
  active: null, // the detection under the pointer
};

/** What the service is asked for: everything that any choice made here can show. */
export const lowestScore = () => Math.min(LOWEST_SCORE, ...Object.values(ownThresholds()));

/** Class name -> the score above which the model itself reports. */
export function ownThresholds() {
  const { classes = [], thresholds } = state.model ?? {};
  const score = thresholds?.score ?? 0.3;
  return Object.fromEntries(classes.map((name) => [name, thresholds?.per_class?.[name] ?? score]));
}

export function isAbove({ label, score }) {
  return score > (state.score ?? ownThresholds()[label] ?? 0.3);
}

export const isShown = (detection) => isAbove(detection) && !state.hidden.has(detection.label);
export const all = (picture) => picture?.answer?.detections ?? [];
export const shown = (picture) => all(picture).filter(isShown);
