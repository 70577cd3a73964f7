// The state of the page, and the detections shown at the chosen thresholds.

const LOWEST_SCORE = 0.05;

export const state = {
  models: [], // every version of every model, those that are not ready too
  model: null, // the one that is asked
  own: {}, // its classes -> the score above which it reports by itself
  tile: false, // large images in tiles
  images: [], // {file, name, status: waiting | sending | done | failed, answer, problem, ...}
  current: null,
  score: null, // null: the model's own thresholds
  hidden: new Set(), // classes that are switched off
  active: null, // the detection that is pointed at
  hold: null, // {problem, until}: nothing is asked before `until`, on the clock of performance.now
  offline: false, // the service does not answer
};

export function useModel(model) {
  const { classes = [], thresholds } = model ?? {};
  const score = thresholds?.score ?? 0.3;
  const own = classes.map((name) => [name, thresholds?.per_class?.[name] ?? score]);
  Object.assign(state, { model, own: Object.fromEntries(own), score: null, active: null });
  state.hidden.clear();
}

/**
 * The query of a request: all detections that any choice on the page can show. In hundredths, the
 * steps of the slider, which count from here.
 */
export const lowestScore = () =>
  Math.floor(100 * Math.min(LOWEST_SCORE, ...Object.values(state.own))) / 100;

export const isAbove = ({ label, score }) => score > (state.score ?? state.own[label] ?? 0.3);
export const isShown = (detection) => isAbove(detection) && !state.hidden.has(detection.label);
export const all = (image) => image?.answer?.detections ?? [];
export const shown = (image) => all(image).filter(isShown);
export const isUnfinished = ({ status }) => status === "waiting" || status === "sending";
