// Painting: the image, boxes with their labels, the histogram of scores.

// Those of service/engine/drawing.py: far apart in hue, dark enough for white text.
const PALETTE = ["#00796f", "#c65500", "#b0175e", "#1565c0", "#4d7c0f", "#7b3fb5", "#8d5a3b"];

export function colourOf(classIndex) {
  return PALETTE[classIndex] ?? `hsl(${(classIndex * 137.508) % 360} 65% 30%)`;
}

/** The largest [width, height] with the image's proportions inside the room; enlarged at most 2x. */
export function fit(image, room) {
  const scale = Math.min(room.width / image.width, room.height / image.height, 2);
  return [Math.max(1, image.width * scale), Math.max(1, image.height * scale)];
}

/** Give a canvas a size in CSS pixels with one canvas pixel per screen pixel. */
export function resize(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
  return context;
}

/**
 * Boxes over an image. scale: drawn pixels per image pixel; unit: size of a thin line in drawn
 * pixels, by which everything else grows; active: the detection to stand out, or null.
 */
export function drawBoxes(context, detections, { scale, unit, labels, active }) {
  context.lineJoin = "round";
  // The highest score last, so that its label is on top.
  for (const detection of [...detections].reverse()) {
    if (detection !== active) drawBox(context, detection, scale, unit, active ? 0.45 : 1, false);
  }
  if (labels) {
    for (const detection of [...detections].reverse()) {
      if (!active) drawLabel(context, detection, scale, unit);
    }
  }
  if (active) {
    drawBox(context, active, scale, unit, 1, true);
    drawLabel(context, active, scale, unit);
  }
}

function drawBox(context, { box, class_id: index }, scale, unit, opacity, filled) {
  const [x, y] = [box.x1 * scale, box.y1 * scale];
  const [width, height] = [(box.x2 - box.x1) * scale, (box.y2 - box.y1) * scale];
  context.beginPath();
  context.roundRect(x, y, width, height, 3 * unit);
  context.globalAlpha = opacity;
  context.lineWidth = 4.5 * unit;
  context.strokeStyle = "rgb(255 255 255 / 70%)";
  context.stroke();
  context.lineWidth = (filled ? 3.5 : 2.5) * unit;
  context.strokeStyle = colourOf(index);
  context.stroke();
  if (filled) {
    context.globalAlpha = 0.22;
    context.fillStyle = colourOf(index);
    context.fill();
  }
  context.globalAlpha = 1;
}

function drawLabel(context, { box, class_id: index, label, score }, scale, unit) {
  context.font = `600 ${12 * unit}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const full = `${label} ${score.toFixed(2)}`;
  // A label larger than its box would hide others; there only the colour shows the class.
  const isDwarfed = context.measureText(full).width > 2.2 * (box.x2 - box.x1) * scale;
  const text = isDwarfed ? score.toFixed(2) : full;
  const [width, height] = [context.measureText(text).width + 10 * unit, 18 * unit];
  const canvasWidth = context.canvas.width / context.getTransform().a;
  const left = box.x1 * scale - 1.25 * unit;
  const x = Math.max(0, Math.min(left, canvasWidth - width));
  const above = box.y1 * scale - height - 1 * unit;
  const y = above >= 0 ? above : Math.max(0, box.y1 * scale + 1.25 * unit);
  context.fillStyle = colourOf(index);
  context.beginPath();
  context.roundRect(x, y, width, height, 4 * unit);
  context.fill();
  context.fillStyle = "#fff";
  context.fillText(text, x + 5 * unit, y + height / 2 + 0.5 * unit);
}

/** How many detections have which score: stacked by class, pale where not shown. */
export function drawHistogram(canvas, detections, isShown, lowest) {
  const { width, height } = canvas.getBoundingClientRect();
  if (!width) return;
  const context = resize(canvas, width, height);
  canvas.style.width = canvas.style.height = "";
  const bins = 48;
  const stacks = Array.from({ length: bins }, () => []);
  for (const detection of detections) {
    const place = (detection.score - lowest) / (1 - lowest);
    stacks[Math.max(0, Math.min(bins - 1, Math.floor(place * bins)))].push(detection);
  }
  // By the square root, so that the many weak ones do not flatten the few strong ones.
  const tallest = Math.sqrt(Math.max(9, ...stacks.map((stack) => stack.length)));
  const step = width / bins;
  stacks.forEach((stack, bin) => {
    const rise = ((height - 1) * Math.sqrt(stack.length)) / tallest / stack.length;
    stack.sort((a, b) => a.class_id - b.class_id).forEach((detection, level) => {
      context.globalAlpha = isShown(detection) ? 1 : 0.35;
      context.fillStyle = colourOf(detection.class_id);
      const gap = rise > 4 ? 1 : 0;
      context.fillRect(bin * step + 0.5, height - (level + 1) * rise, step - 1, rise - gap);
    });
  });
}

/**
 * An image in its full size with its boxes, as a PNG blob; for workers. width: what boxes are
 * measured in, should the image have been decoded smaller.
 */
export function annotated(bitmap, detections, { width, labels }) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const unit = Math.max(0.75, Math.max(canvas.width, canvas.height) / 1000);
  drawBoxes(context, detections, { scale: canvas.width / width, unit, labels, active: null });
  return canvas.convertToBlob({ type: "image/png" });
}
