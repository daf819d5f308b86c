// Boxes [x0,y0,x1,y1] in fractions of the image, as answers write them.
const BOX = /\[\s*([01](?:\.\d+)?|\.\d+)\s*,\s*([01](?:\.\d+)?|\.\d+)\s*,\s*([01](?:\.\d+)?|\.\d+)\s*,\s*([01](?:\.\d+)?|\.\d+)\s*\]/g;
const COLORS = ["#ef4444", "#22a45d", "#3b82f6", "#eab308", "#a855f7", "#f97316"];

/** Fill `node` with the text; returns its boxes, which are marked in it. */
export function writeText(node, text) {
  const boxes = [];
  let end = 0;
  node.replaceChildren();
  for (const found of text.matchAll(BOX)) {
    const [x0, y0, x1, y1] = found.slice(1).map(Number);
    if (!(x0 < x1 && y0 < y1 && x1 <= 1 && y1 <= 1)) continue;
    const color = COLORS[boxes.length % COLORS.length];
    const chip = document.createElement("span");
    chip.className = "chip";
    chip.style.borderColor = color;
    chip.textContent = found[0];
    node.append(text.slice(end, found.index), chip);
    end = found.index + found[0].length;
    boxes.push({ x0, y0, x1, y1, color });
  }
  node.append(text.slice(end));
  return boxes;
}

/** The image with boxes on it. */
export function drawBoxes(address, boxes) {
  const figure = document.createElement("figure");
  figure.className = "drawn";
  const image = document.createElement("img");
  image.src = address;
  image.alt = "";
  figure.append(image);
  for (const { x0, y0, x1, y1, color } of boxes) {
    const frame = document.createElement("i");
    Object.assign(frame.style, { left: `${x0 * 100}%`, top: `${y0 * 100}%`, borderColor: color });
    Object.assign(frame.style, { width: `${(x1 - x0) * 100}%`, height: `${(y1 - y0) * 100}%` });
    figure.append(frame);
  }
  return figure;
}
